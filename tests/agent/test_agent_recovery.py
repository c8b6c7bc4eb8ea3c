"""An agent whose memory runs out: every step down, the way back up, and no lost answer or talk.

The card is a fake, because this fault cannot be had on demand: an account of bytes that refuses what is beyond its
limit, as an allocator does. The chain, the policy, the loop, the memory of talks and, where it says so, the engine are
the real ones.
"""

import dataclasses
import random

import pytest
import torch
from helpers import agent_of
from memory.helpers import open_memory
from memory_card import ADAPTER, Card, CardEngine, ask, chain_on, fixed_chain

from agentlab.hardware.recovery import CALM_ANSWERS, MAX_STEPS
from agentlab.inference import OutOfMemoryError
from agentlab.inference.chain import Chain, Link

DOWN = ["shrink_context"] * 2 + ["offload_adapters"] + ["lower_rung"] * 3


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (12_000, []),
        (11_000, DOWN[:1]),
        (10_100, DOWN[:2]),
        (9_000, DOWN[:3]),
        (5_000, DOWN[:4]),
        (3_000, DOWN[:5]),
        (2_600, DOWN),
        (1_900, [*DOWN, "smaller_model", "shrink_context"]),
    ],
)
def test_less_memory_takes_more_steps_in_their_order_and_the_answer_comes(limit, expected):
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card, (1.0, 0.1)), max_new_tokens=2000)
    agent.load()
    card.limit = limit
    done, result = ask(agent)
    assert done == expected
    assert (result.state, result.final_answer) == ("answered", "I answer.")
    assert len(result.fallbacks) == len(expected)


def test_where_no_model_fits_on_the_card_the_last_one_answers_on_the_cpu():
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card, (1.0, 0.5, 0.1)), max_new_tokens=2000)
    agent.load()
    card.limit = 0
    done, result = ask(agent)
    assert done == [*DOWN, "smaller_model", *["lower_rung"] * 3, "smaller_model", *["lower_rung"] * 3, "cpu"]
    assert (result.state, result.model_info.device, result.model_info.role) == ("answered", "cpu", "emergency")
    assert ask(agent)[0] == []  # it stays there


def test_when_nothing_is_left_the_answer_fails_honestly_and_memory_that_returns_is_used():
    card = Card(12_000, ram=0)
    agent = agent_of(chain=chain_on(card, (1.0, 0.1)), max_new_tokens=2000)
    agent.load()
    card.limit = 0
    done, result = ask(agent)
    assert done[-4:] == ["cpu", *["lower_rung"] * 3]
    assert result.state == "failed"
    assert "no model of the chain is left" in result.error or "memory" in result.error
    assert ask(agent)[1].state == "failed"
    card.limit = 10**6
    assert ask(agent)[1].state == "answered"  # at once: where no model is left there is nothing to wait for


@pytest.mark.parametrize("sizes", [(1.0,), (1.0, 0.1)])
def test_no_request_is_refused_without_a_try_when_memory_is_back_however_often_it_was_lacking(sizes):
    card = Card(12_000, ram=0)
    chain = chain_on(card, sizes)
    agent = agent_of(chain=chain, max_new_tokens=2000)
    for _ in range(4):
        card.limit = 0
        assert [ask(agent)[1].state for _ in range(3)] == ["failed"] * 3
        assert not chain.usable
        card.limit = 10**6
        assert ask(agent)[1].state == "answered"
        for _ in range(999):
            ask(agent)
            if not chain._given_up.steps:
                break
        assert not chain._given_up.steps


def test_where_no_model_is_left_the_memory_has_to_be_free_all_the_same():
    card = Card(12_000, ram=0)
    chain = chain_on(card, adapters=0)
    agent = agent_of(chain=chain, max_new_tokens=500)
    card.limit = 0
    assert ask(agent)[1].state == "failed"
    card.limit = 2_400  # the smallest rung is 2,000, and a quarter more has to be free
    assert [ask(agent)[1].state for _ in range(9)] == ["failed"] * 9
    card.limit = 2_600
    chain.rewind()  # as whoever watches the memory may do while nobody asks
    assert chain.usable
    assert ask(agent)[1].state == "answered"


def test_the_number_of_steps_in_an_answer_is_bounded():
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card, (1.0, 0.5, 0.1), max_steps=3), max_new_tokens=2000)
    agent.load()
    card.limit = 0
    done, result = ask(agent)
    assert done == [*DOWN[:3], "smaller_model", "smaller_model"]
    assert result.state == "failed"


def test_steps_are_undone_in_reverse_one_at_a_time_when_memory_has_returned():
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card), max_new_tokens=2000)
    agent.load()
    for card.limit, expected in ((5_000, DOWN[:4]), (3_000, DOWN[4:5]), (2_600, DOWN[5:])):
        assert ask(agent)[0] == expected
    assert [ask(agent)[0] for _ in range(2 * CALM_ANSWERS)] == [[]] * 2 * CALM_ANSWERS  # there is no more memory yet
    card.limit = 14_000
    undone = [ask(agent)[0] for _ in range(len(DOWN) * CALM_ANSWERS)]
    assert undone[0] == [f"undo {DOWN[-1]}"]  # there was calm enough
    assert all(len(done) <= 1 for done in undone)
    assert [done[0] for done in undone if done] == [f"undo {kind}" for kind in reversed(DOWN)]
    (engine,) = agent.chain._models.engines.values()
    assert (engine.rung, engine.idle, engine.context) == ("bf16", 3, 4096)


def test_a_step_that_has_to_be_taken_again_waits_longer_for_its_next_undoing():
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card, adapters=0), max_new_tokens=500)
    agent.load()

    def quiet_answers_until_undone():
        for count in range(99):
            if ask(agent)[0]:
                return count

    waits = []
    for _ in range(3):
        card.limit = 8_300
        assert ask(agent)[0] == ["lower_rung"]
        card.limit = 14_000
        waits.append(quiet_answers_until_undone())
    assert waits == [CALM_ANSWERS, 2 * CALM_ANSWERS, 4 * CALM_ANSWERS]


def test_what_is_no_answer_is_no_quiet_one():
    card = Card(12_000)
    agent = agent_of(chain=chain_on(card, adapters=0), max_new_tokens=500)
    agent.load()
    card.limit = 8_300
    assert ask(agent)[0] == ["lower_rung"]
    card.limit = 14_000
    for _ in range(9):
        agent.chain.rewind()  # as whoever watches the memory may do while nobody asks
    assert [ask(agent)[0] for _ in range(CALM_ANSWERS + 1)] == [[]] * CALM_ANSWERS + [["undo lower_rung"]]


def test_a_rung_that_memory_does_not_suffice_for_on_the_way_back_up_is_left_alone():
    card = Card(12_000)
    chain = chain_on(card, adapters=0)
    agent = agent_of(chain=chain, max_new_tokens=500)
    agent.load()
    card.limit = 8_300
    assert ask(agent)[0] == ["lower_rung"]
    chain._free_bytes = lambda: 10**9  # the monitor is wrong about it
    states = [ask(agent)[1] for _ in range(9)]
    assert all(result.state == "answered" for result in states)


def test_a_task_that_needs_the_whole_context_keeps_it():
    card = Card(14_000)
    agent = agent_of(chain=chain_on(card), max_new_tokens=40)
    agent.load()
    card.limit = 8_000 + 3 * ADAPTER + 1_500
    done, result = ask(agent, "word " * 1_400)  # 1,750 tokens that cannot be left out
    assert done == ["shrink_context", "undo shrink_context", "offload_adapters"]
    assert (result.state, result.final_answer) == ("answered", "I answer.")


@pytest.mark.parametrize("wanted", [500, 2_000, 40_000])
def test_a_shrunken_context_loses_no_answer_for_a_large_limit_on_its_length(wanted):
    card = Card(14_000)
    agent = agent_of(chain=chain_on(card), max_new_tokens=40)
    agent.load()
    card.limit = 8_000 + 3 * ADAPTER + 600
    assert ask(agent, options=dataclasses.replace(agent.options, max_new_tokens=2_000))[0] == ["shrink_context"] * 2
    (engine,) = agent.chain._models.engines.values()
    assert engine.context == 512
    card.limit = 14_000
    task = "word " * 520  # 650 tokens
    options = dataclasses.replace(agent.options, max_new_tokens=wanted)
    done, result = ask(agent, task, options=options)
    assert done == ["undo shrink_context"]
    assert (result.state, result.final_answer) == ("answered", "I answer.")


def test_a_burst_of_a_lack_of_memory_does_not_bar_a_model_of_unknown_size():
    card = Card(12_000)
    chain = chain_on(card, (1.0, 0.1), adapters=0)
    for link in chain.links:  # as one that is stored quantized, or runs in another process
        object.__setattr__(link, "planned", lambda: None)
    agent = agent_of(chain=chain, max_new_tokens=500)
    agent.load()
    chain._models.engines[0].footprint = lambda adapter=None: None
    card.limit = 1_400
    assert ask(agent)[0] == ["smaller_model"]
    card.limit = 12_000
    roles = [ask(agent)[1].model_info.role for _ in range(CALM_ANSWERS + 2)]
    assert roles == ["fallback"] * CALM_ANSWERS + ["primary"] * 2


def test_a_model_of_unknown_size_that_cannot_move_to_the_cpu_is_tried_again_on_the_card():
    card = Card(12_000)

    def opened():
        engine = CardEngine(card, 1.0, "bf16", "cuda", 0)
        engine.footprint = lambda adapter=None: None
        return engine

    def reopen(rung, on_cpu):
        raise ImportError("its kernels need a GPU")

    agent = agent_of(chain=Chain([Link("primary", "alone", opened, reopen=reopen)], card.free), max_new_tokens=500)
    agent.load()
    card.limit = 8_100
    assert [ask(agent)[1].state for _ in range(2)] == ["failed"] * 2
    card.limit = 12_000
    assert [ask(agent)[1].state for _ in range(3)] == ["answered"] * 3


ERRORS = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("CUDA error: out of memory"),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    lambda: OutOfMemoryError("not even one request fits into the device's memory"),
    MemoryError,
]


class Moody(Card):
    """A card whose limit changes by chance before every allocation, and whose errors are every library's."""

    def __init__(self, draw):
        super().__init__(20_000, ram=draw.choice([0, 3_000, 10**6]))
        self.draw, self.calm = draw, False
        self.error = self.any_error

    def any_error(self):
        return self.draw.choice(ERRORS)()

    def allocate(self, device, size):
        if not self.calm and size > 0:
            self.limit = self.draw.choice([0, 1_000, 2_500, 5_000, 9_000, 12_000, 20_000])
        super().allocate(device, size)


@pytest.mark.parametrize("chain_of_sizes", [chain_on, fixed_chain])
@pytest.mark.parametrize("seed", range(50))
def test_no_sequence_of_failures_ends_in_a_crash_or_a_lost_talk(seed, chain_of_sizes, tmp_path):
    draw = random.Random(seed)
    card = Moody(draw)
    sizes = draw.choice([(1.0,), (1.0, 0.3), (1.0, 0.5, 0.1)])
    with open_memory(tmp_path / "memory.db") as memory:
        agent = agent_of(chain=chain_of_sizes(card, sizes), memory=memory, max_new_tokens=2000, recall=0)
        answered = []
        for turn in range(5):
            task = f"Question {turn}: {'word ' * draw.choice([1, 200, 1500])}"
            done, result = ask(agent, task, session_id="talk")
            assert len(done) <= 2 * (MAX_STEPS + len(sizes)) + 1
            if result.state == "answered":
                assert result.final_answer == "I answer."
                answered.append(task)
            else:
                assert (result.state, result.final_answer) == ("failed", "")
                assert result.error
            assert [item.user_input for item in memory.conversation("talk").turns()] == answered
        card.calm, card.limit = True, 10**9
        for _ in range(200):  # memory has returned: everything is taken back
            done, result = ask(agent, "And now?")
            if not agent.chain._given_up.steps:
                break
        assert (result.state, result.model_info.role, result.model_info.device) == ("answered", "primary", "cuda")
        (engine,) = [one for at, one in agent.chain._models.engines.items() if at == 0]
        assert (engine.rung, engine.context) == ("bf16", 4096)
        assert engine.name == ("fixed" if chain_of_sizes is fixed_chain else "scripted")
        agent.close()
    assert card.held == {}


class TestOnARealEngine:
    """The tiny model at real rungs, on an allocator that refuses what the ledger counts beyond a limit."""

    @pytest.fixture
    def limited(self, tiny_model, monkeypatch):
        from agentlab import models
        from agentlab.config import Settings
        from agentlab.inference.opening import open_engine, planned_footprint
        from agentlab.inference.transformers_engine import TransformersEngine

        files, settings, room = models.resolve(str(tiny_model)), Settings(name="test"), {"bytes": 10**9}
        real = TransformersEngine._batch

        def scarce(self, requests, prompts, *rest):
            held = self.footprint()
            if held.rung_bytes[held.rung] + held.idle_adapter_bytes > room["bytes"]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(self, requests, prompts, *rest)

        monkeypatch.setattr(TransformersEngine, "_batch", scarce)

        def reopen(rung=None, on_cpu=False):
            return open_engine(settings, files, "transformers", rung, on_cpu)

        link = Link("primary", "tiny", reopen, reopen=reopen, planned=lambda: planned_footprint(settings, files, "cpu"))
        return Chain([link], lambda: max(0, room["bytes"])), room

    def test_a_talk_goes_on_at_a_lower_rung_and_back_at_the_first(self, limited, tmp_path):
        chain, room = limited
        with open_memory(tmp_path / "memory.db") as memory:
            agent = agent_of(chain=chain, memory=memory, max_new_tokens=8, recall=0)
            assert ask(agent, "My name is Tomas.", session_id="s1")[0] == []
            (engine,) = chain._models.engines.values()
            sizes = engine.rung_bytes()
            room["bytes"] = sizes["nf4"] + 1_000
            assert sizes["nf4"] + 1_000 < sizes["bf16"] < sizes["int8"]  # its embedding is in fp32: it is passed over
            steps = list(agent.run("What is my name?", session_id="s1"))
            assert [(s.source, s.target) for s in steps if s.kind == "recovered"] == [
                ("fp32", "bf16"),
                ("bf16", "nf4"),
            ]
            assert engine.rung == "nf4"
            shown = [m["content"] for s in steps if s.kind == "generated" for m in s.messages if m["role"] == "user"]
            assert shown == ["My name is Tomas.", "What is my name?"]
            assert steps[-1].result.state == "answered"
            assert len(steps[-1].result.fallbacks) == 2
            room["bytes"] = 10**9
            for _ in range(2 * CALM_ANSWERS + 1):
                ask(agent, "And now?", session_id="s1")
            assert engine.rung == "fp32"
            assert len(memory.conversation("s1").turns()) == 3 + 2 * CALM_ANSWERS
            agent.close()
