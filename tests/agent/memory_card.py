"""A card that runs out of memory as a test wants it, and engines whose weights, adapters and caches lie on it."""

import torch
from helpers import Scripted

from agentlab.hardware.recovery import MAX_STEPS, Footprint
from agentlab.inference import EngineError
from agentlab.inference.chain import Chain, Link

RUNGS = {"bf16": 8000, "int8": 4200, "nf4": 2300, "hqq3": 2000}
ADAPTER = 500
ROLES = ["primary", "fallback", "emergency"]


class Card:
    """Memory of so many bytes, in which engines hold their weights; `limit` may change at any time."""

    def __init__(self, limit, ram=10**6, error=lambda: torch.OutOfMemoryError("CUDA out of memory")):
        self.limits = {"cuda": limit, "cpu": ram}
        self.held = {}
        self.error = error

    @property
    def limit(self):
        return self.limits["cuda"]

    @limit.setter
    def limit(self, value):
        self.limits["cuda"] = value

    def used(self, device):
        return sum(size for place, size in self.held.values() if place == device)

    def allocate(self, device, size):
        if size > 0 and self.used(device) + size > self.limits[device]:
            raise self.error()

    def free(self):
        return max(0, self.limit - self.used("cuda"))


class CardEngine(Scripted):
    """An engine whose weights, adapters and cache lie on a `Card`; a token of the cache is a byte."""

    def __init__(self, card, size, rung, device, adapters):
        super().__init__("I answer.", context=4096)
        self.card, self.size, self.rung, self.device, self.idle = card, size, rung, device, adapters
        card.allocate(device, self.weights(rung))
        self.hold()

    def weights(self, rung):
        return int(self.size * RUNGS[rung])

    def hold(self):
        self.card.held[id(self)] = self.device, self.weights(self.rung) + self.idle * ADAPTER

    def footprint(self, adapter=None):
        sizes = {rung: self.weights(rung) for rung in RUNGS}
        return Footprint(self.device, self.context, 1, self.rung, sizes, self.idle, self.idle * ADAPTER)

    def relieve(self, action, adapter=None):
        self.change(action, action.target)

    def restore(self, action):
        self.change(action, action.source)

    def change(self, action, value):
        if action.kind == "shrink_context":
            self.context = int(value)
        elif action.kind == "offload_adapters":
            self.card.allocate(self.device, (int(value) - self.idle) * ADAPTER)
            self.idle = int(value)
        else:
            before = self.card.held.pop(id(self))
            try:
                self.card.allocate(self.device, self.weights(value))
            except Exception:
                self.card.held[id(self)] = before
                raise
            self.rung = value
        self.hold()

    def stream(self, request, should_stop=lambda: False):
        self.card.allocate(self.device, self.count_tokens(request.messages) + request.max_new_tokens)
        yield from super().stream(request, should_stop)

    def close(self):
        super().close()
        self.card.held.pop(id(self), None)


def chain_on(card, sizes=(1.0,), adapters=3, max_steps=MAX_STEPS):
    """A chain of models of these sizes on one card; only the first has adapters beside the one in use."""

    def link(index, size):
        def reopen(rung=None, on_cpu=False):
            return CardEngine(card, size, rung or "bf16", "cpu" if on_cpu else "cuda", 0)

        def opened():
            return CardEngine(card, size, "bf16", "cuda", adapters if index == 0 else 0)

        planned = Footprint("cuda", 4096, 1, "bf16", {rung: int(size * RUNGS[rung]) for rung in RUNGS})
        return Link(ROLES[index], f"model-{ROLES[index]}", opened, reopen=reopen, planned=lambda: planned)

    return Chain([link(index, size) for index, size in enumerate(sizes)], card.free, max_steps)


def ask(agent, task="Who?", **options):
    """(what was done for memory, as words; the result)."""
    steps = list(agent.run(task, **options))
    done = []
    for step in steps:
        if step.kind == "recovered":
            done.append(("undo " if step.undone else "") + step.action)
        elif step.kind == "fell_back":
            done.append("smaller_model")
    assert steps[-1].kind == "answered"
    return done, steps[-1].result


class Fixed(CardEngine):
    """An engine that gives nothing up once it is loaded, as vLLM's process does."""

    name = "fixed"

    def footprint(self, adapter=None):
        return None

    def relieve(self, action, adapter=None):
        raise EngineError("it cannot")


def fixed_chain(card, sizes=(1.0,), engine=Fixed):
    """A chain whose models are opened on an engine without rungs, and elsewhere where memory is lacking."""
    chain = chain_on(card, sizes, adapters=0)
    for link, size in zip(chain.links, sizes, strict=True):
        object.__setattr__(link, "open", lambda size=size: engine(card, size, "bf16", "cuda", 0))
    return chain
