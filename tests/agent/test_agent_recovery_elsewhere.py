"""Where an engine can give nothing up, and where an adapter finds no memory: what the chain does about it.

The card is a fake, as in `test_agent_recovery.py`.
"""

import dataclasses

import pytest
from helpers import agent_of
from memory.helpers import open_memory
from memory_card import ADAPTER, Card, CardEngine, Fixed, ask, chain_on, fixed_chain

from agentlab.hardware.recovery import CALM_ANSWERS
from agentlab.inference import OutOfMemoryError


@pytest.mark.parametrize(
    ("limit", "expected", "rung"),
    [(5_000, ["lower_rung"], "int8"), (4_300, ["lower_rung", "shrink_context", "lower_rung"], "nf4")],
)
def test_a_model_on_an_engine_without_rungs_answers_on_one_that_has_them(limit, expected, rung, tmp_path):
    card = Card(12_000)
    with open_memory(tmp_path / "memory.db") as memory:
        agent = agent_of(chain=fixed_chain(card, (1.0, 0.1)), memory=memory, max_new_tokens=600, recall=0)
        assert ask(agent, "My name is Tomas.", session_id="s1")[0] == []
        card.limit = limit
        done, result = ask(agent, "What is my name?", session_id="s1")
        assert done == expected
        assert (result.state, result.model_info.role) == ("answered", "primary")
        (engine,) = agent.chain._models.engines.values()
        assert (engine.name, engine.rung) == ("scripted", rung)
        shown = [message["content"] for message in engine.requests[-1].messages if message["role"] == "user"]
        assert shown == ["My name is Tomas.", "What is my name?"]
        card.limit = 12_000
        undone = [ask(agent)[0] for _ in range(len(expected) * CALM_ANSWERS + 1)]
        assert [done[0] for done in undone if done] == [f"undo {kind}" for kind in reversed(expected)]
        (engine,) = agent.chain._models.engines.values()
        assert (engine.name, engine.rung) == ("fixed", "bf16")
        agent.close()
    assert card.held == {}


def test_an_engine_without_rungs_that_cannot_be_loaded_again_stays_left():
    card = Card(12_000)
    chain = fixed_chain(card)
    agent = agent_of(chain=chain, max_new_tokens=600)
    agent.load()
    card.limit = 5_000
    assert ask(agent)[0] == ["lower_rung"]
    chain._free_bytes = lambda: 10**9  # the monitor is wrong about it
    results = [ask(agent) for _ in range(4 * CALM_ANSWERS)]
    assert {result.state for _, result in results} == {"answered"}
    (engine,) = chain._models.engines.values()
    assert engine.rung == "int8"


def test_what_leaving_an_engine_frees_is_all_that_it_takes(monkeypatch):
    monkeypatch.setattr(Fixed, "planned_vram_mib", lambda engine, rows, tokens: 10_000 / 2**20)  # its cache included
    card = Card(12_000)
    agent = agent_of(chain=fixed_chain(card), max_new_tokens=600)
    agent.load()
    card.limit = 5_000
    (step,) = [step for step in agent.run("Who?") if step.kind == "recovered"]
    assert (step.source, step.target, step.bytes_expected) == ("bf16", "int8", 10_000 - 4_200)
    assert step.reason.endswith("; fixed has no rungs, and the model is opened elsewhere")
    card.limit = 10_000  # its weights fit beside what an answer needs, with less of a cache
    undone = [done for _ in range(2 * CALM_ANSWERS) for done in ask(agent)[0]]
    assert undone == ["undo lower_rung"]
    (engine,) = agent.chain._models.engines.values()
    assert (engine.name, engine.rung) == ("fixed", "bf16")


def test_what_breaks_at_a_lower_rung_says_nothing_of_the_engine_that_lacked_memory():
    card = Card(12_000)
    chain = fixed_chain(card)
    chain.links[0] = dataclasses.replace(chain.links[0], otherwise=lambda: pytest.fail("vLLM did not break"))
    agent = agent_of(chain=chain, max_new_tokens=600)
    agent.load()
    card.limit = 5_000
    assert ask(agent)[0] == ["lower_rung"]
    (engine,) = chain._models.engines.values()
    engine.replies = [RuntimeError("the card fell off")]
    _, result = ask(agent)
    assert (result.state, result.error) == ("failed", "model-primary broke: the card fell off")
    assert not any("another engine" in told for told in result.fallbacks)


class Seats(CardEngine):
    """An engine whose adapters are loaded by name; those that were moved into RAM take nothing of the card."""

    def __init__(self, card, size, rung, device, adapters):
        self.beside, self.parked = [], []
        super().__init__(card, size, rung, device, 0)

    def hold(self):
        self.card.held[id(self)] = self.device, self.weights(self.rung) + len(self.beside) * ADAPTER

    def load_adapter(self, adapter, folder):
        self.card.allocate(self.device, ADAPTER)
        self.beside.append(adapter)
        self.hold()

    def unload_adapter(self, adapter):
        for place in (self.beside, self.parked):
            if adapter in place:
                place.remove(adapter)
        self.hold()

    def adapters(self):
        return sorted(self.beside + self.parked)

    def footprint(self, adapter=None):
        idle = [name for name in self.beside if name != adapter]
        return dataclasses.replace(super().footprint(), idle_adapters=len(idle), idle_adapter_bytes=len(idle) * ADAPTER)

    def relieve(self, action, adapter=None):
        if action.kind == "offload_adapters":
            self.parked += [name for name in self.beside if name != adapter]
            self.beside = [name for name in self.beside if name == adapter]
            self.hold()
        else:
            super().relieve(action, adapter)


@pytest.fixture
def seated(tmp_path):
    """A chain that holds adapter one, its card, and a function that gives the link with another one."""
    card = Card(12_000)
    chain = fixed_chain(card, engine=Seats)
    own = dataclasses.replace(chain.links[0], adapter="one", adapter_folder=tmp_path)
    chain.links[0] = dataclasses.replace(own, reopen=lambda rung, on_cpu: Seats(card, 1.0, rung, "cuda", 0))
    chain.current()
    card.limit = card.used("cuda")
    return chain, card, lambda name: dataclasses.replace(chain.links[0], adapter=name)


def told(chain):
    return [step.action for step in chain.take_news()]


def test_an_adapter_that_does_not_fit_beside_the_others_takes_their_place(seated):
    chain, _, other = seated
    chain.use(other("two"))
    engine = chain.current()[1]
    assert (chain.link.adapter, engine.beside, engine.parked) == ("two", ["two"], ["one"])
    assert told(chain) == ["offload_adapters"]


def test_an_adapter_that_an_answer_waits_for_is_worth_a_rung(seated):
    chain, card, other = seated
    card.limit = 8_000
    for pressing in (False, True):
        if not pressing:
            with pytest.raises(OutOfMemoryError, match="adapter two finds no memory: CUDA out of memory"):
                chain.use(other("two"))
            assert chain.link.adapter == "one"
            assert chain.current()[1].adapters() == ["one"]
        else:
            chain.use(other("two"), pressing=True)
    engine = chain.current()[1]
    assert (chain.link.adapter, engine.rung, engine.beside) == ("two", "int8", ["two"])
    assert told(chain) == ["offload_adapters", "lower_rung"]


def test_an_adapter_that_an_engine_without_rungs_has_no_memory_for_is_loaded_on_the_other(seated, monkeypatch):
    chain, _, other = seated
    fixed = chain.current()[1]
    fixed.footprint = lambda adapter=None: None
    with pytest.raises(OutOfMemoryError, match="adapter two finds no memory"):
        chain.use(other("two"))  # nobody waits for it: that is not worth another engine
    assert chain.current()[1] is fixed
    chain.use(other("two"), pressing=True)
    engine = chain.current()[1]
    assert (fixed.closed, engine.rung, engine.beside) == (True, "int8", ["two"])
    assert told(chain) == ["lower_rung"]


def test_an_adapter_that_never_fits_leaves_the_one_that_is_there(seated, monkeypatch):
    chain, card, other = seated

    def never(engine, adapter, folder):
        raise MemoryError

    monkeypatch.setattr(Seats, "load_adapter", never)
    with pytest.raises(OutOfMemoryError, match="adapter two finds no memory"):
        chain.use(other("two"), pressing=True)
    assert chain.link.adapter == "one"
    assert chain.current()[1].adapters() == ["one"]
    assert told(chain) == ["offload_adapters", *["lower_rung"] * 3]
    card.limit = 12_000
    agent = agent_of(chain=chain, max_new_tokens=200)
    assert ask(agent)[1].state == "answered"


def test_a_model_that_is_kept_for_later_gives_way_to_an_adapter(tmp_path):
    card = Card(12_000)
    chain = chain_on(card, (1.0, 0.1), adapters=0)
    object.__setattr__(chain.links[0], "open", lambda: Seats(card, 1.0, "bf16", "cuda", 0))
    chain.current()
    chain.fall("its words were unusable", broken=False)
    chain.current()
    chain.take_news()
    chain.rewind()
    card.limit = card.used("cuda")
    chain.use(dataclasses.replace(chain.links[0], adapter="two", adapter_folder=tmp_path))
    assert chain.current()[1].beside == ["two"]
    (step,) = chain.take_news()
    assert (step.model, step.action, step.source, step.target) == (
        "model-primary",
        "close_idle",
        "model-fallback",
        "none",
    )
    assert step.bytes_expected == 800
