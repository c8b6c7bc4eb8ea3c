"""An engine that says what a test tells it to, for faults that no real model produces on demand."""

import time
from collections.abc import Iterator

from agentlab.agent import Agent, Options
from agentlab.inference import Chunk, Completion, Engine
from agentlab.inference.chain import Chain, Link


class Scripted(Engine):
    """Answers with the next of `replies`: a text, an exception to raise, or a function of the request.

    A token is four characters and takes `token_s` seconds; reading the prompt takes `prefill_s`. logprob: of each
    token; None: it tells none.
    """

    name, device = "scripted", "cpu"

    def __init__(self, *replies, token_s=0.0, prefill_s=0.0, context=4096, style=None, logprob=-0.1):
        self.replies = list(replies)
        self.requests = []
        self.token_s, self.prefill_s, self.context, self.style, self.logprob = (
            token_s, prefill_s, context, style, logprob
        )  # fmt: skip
        self.closed = False

    def load_adapter(self, adapter, folder):
        pass

    def unload_adapter(self, adapter):
        pass

    def adapters(self):
        return []

    def answers(self, requests, batch_size=32, should_stop=lambda: False):
        for index, request in enumerate(requests):
            yield index, [chunk.completion for chunk in self.stream(request, should_stop)][-1]

    def count_tokens(self, messages, tools=None):
        return sum(len(str(message.get("content", ""))) // 4 + 4 for message in messages)

    def call_style(self):
        return self.style

    def context_length(self):
        return self.context

    def close(self):
        self.closed = True

    def stream(self, request, should_stop=lambda: False) -> Iterator[Chunk]:
        assert not self.closed
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if callable(reply) and not isinstance(reply, BaseException | type):
            reply = reply(request)
        if isinstance(reply, BaseException):
            raise reply
        time.sleep(self.prefill_s)
        pieces = [reply[at : at + 4] for at in range(0, len(reply), 4)][: request.max_new_tokens]
        said, reason = [], "stop" if len(reply) <= 4 * request.max_new_tokens else "length"
        for piece in pieces:
            if should_stop():
                reason = "cancelled"
                break
            time.sleep(self.token_s)
            said.append(piece)
            yield Chunk(piece)
        tokens = list(range(len(said)))
        logprobs = None if self.logprob is None else [self.logprob] * len(said)
        size = self.count_tokens(request.messages)
        yield Chunk("", Completion("".join(said), tokens, reason, size, 0.01, logprobs))


def call(name, **arguments):
    from agentlab.toolformat import render_call

    return render_call(name, arguments)


def chain_of(*engines):
    """A chain of scripted engines; an exception stands for a model that cannot be loaded."""

    def opener(engine):
        def opened():
            if isinstance(engine, BaseException):
                raise engine
            return engine

        return opened

    roles = ["primary", "fallback", "emergency"]
    return Chain([Link(role, f"model-{role}", opener(e)) for role, e in zip(roles, engines, strict=False)])


def agent_of(*replies, tools=(), chain=None, memory=None, builtin_tools=False, engine=None, **options):
    """An agent on one scripted engine, or on `chain`; options as in `Options`."""
    chain = chain or chain_of(engine or Scripted(*replies))
    return Agent(chain, tools, memory=memory, builtin_tools=builtin_tools, options=Options(**options))


def kinds(steps):
    """Names of the steps but for the pieces of text."""
    return [step.kind for step in steps if step.kind != "delta"]
