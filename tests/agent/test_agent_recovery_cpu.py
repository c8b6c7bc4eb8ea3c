"""The last resort, the CPU: which model goes there, what it leaves behind, what becomes of those that fail on the way.

The card is a fake, as in `test_agent_recovery.py`.
"""

import dataclasses

import pytest
from helpers import agent_of
from memory_card import Card, CardEngine, Fixed, ask, chain_on, fixed_chain

from agentlab.errors import AdapterError, ModelError
from agentlab.hardware.recovery import CALM_ANSWERS
from agentlab.inference import EngineError
from agentlab.inference.chain import Chain, Link
from agentlab.inference.contract import EngineBroken, LimitTooSmallError, NoRoomElsewhereError
from agentlab.inference.openai_server import ServerError


def missing(*_):
    raise ModelError("model org/x is not on this machine; download it with: agentlab models get org/x")


def down(*_):
    raise ServerError("the server cannot be reached")


def nothing_on_the_card(chain, card):
    agent = agent_of(chain=chain, max_new_tokens=500)
    agent.load()
    card.limit = 0
    return agent


def test_where_the_last_model_is_not_here_the_one_before_answers_on_the_cpu():
    card = Card(12_000)
    chain = chain_on(card, (1.0, 0.1), adapters=0)
    chain.links[1] = dataclasses.replace(chain.links[1], open=missing, reopen=missing)
    agent = nothing_on_the_card(chain, card)
    done, result = ask(agent)
    assert done == [*["lower_rung"] * 3, "smaller_model", "cpu"]
    assert (result.state, result.model_info.role, result.model_info.device) == ("answered", "primary", "cpu")
    assert ask(agent)[1].state == "answered"
    card.limit = 20_000
    undone = [done[0] for _ in range(9) if (done := ask(agent)[0])]
    assert undone == ["undo cpu", *["undo lower_rung"] * 3]


@pytest.mark.parametrize(
    "last", [Link("emergency", "served", down), Link("emergency", "here", missing, reopen=missing)]
)
def test_a_model_that_is_known_to_be_of_no_use_is_not_moved_to_the_cpu(last):
    card = Card(12_000)
    chain = chain_on(card, (1.0, 0.1), adapters=0)
    chain.links[1] = last
    agent = agent_of(chain=chain, max_new_tokens=500)
    agent.load()
    chain.fall("its words were unusable", broken=False)
    with pytest.raises(ModelError):
        chain.current()
    chain.take_news()
    card.limit = 0
    done, result = ask(agent)
    assert done == [*["lower_rung"] * 3, "cpu"]
    assert (result.state, result.model_info.role, result.model_info.device) == ("answered", "primary", "cpu")


def test_where_the_ram_is_too_small_for_the_last_model_another_one_goes_there():
    card = Card(12_000, ram=1_900)
    agent = nothing_on_the_card(chain_on(card, (0.3, 1.0), adapters=0), card)
    for _ in range(2):
        _, result = ask(agent)
        assert (result.state, result.model_info.role, result.model_info.device) == ("answered", "primary", "cpu")


def test_a_machine_without_room_is_not_asked_for_every_rung():
    card = Card(12_000)

    def reopen(rung, on_cpu):
        if on_cpu:
            raise NoRoomElsewhereError("9.0 GiB of swap are in use")
        return CardEngine(card, 1.0, rung, "cuda", 0)

    chain = chain_on(card, adapters=0)
    chain.links[0] = dataclasses.replace(chain.links[0], reopen=reopen)
    agent = nothing_on_the_card(chain, card)
    done, result = ask(agent)
    assert done == [*["lower_rung"] * 3, "cpu"]
    assert (result.state, "9.0 GiB of swap" in result.error) == ("failed", True)


def test_a_model_that_comes_back_from_the_cpu_is_what_it_was_on_the_card():
    card = Card(12_000, ram=3_000)
    chain = chain_on(card, adapters=0)
    agent = agent_of(chain=chain, max_new_tokens=200)
    agent.load()
    card.limit = 5_000
    assert ask(agent)[0] == ["lower_rung"]
    card.limit = 1_000
    assert ask(agent)[0] == [*["lower_rung"] * 2, "cpu", "lower_rung", "lower_rung"]
    (engine,) = chain._models.engines.values()
    assert (engine.device, engine.rung) == ("cpu", "nf4")
    card.limit = 20_000
    (undone,) = [done for _ in range(CALM_ANSWERS + 1) if (done := ask(agent)[0])]
    (engine,) = chain._models.engines.values()
    assert (undone, engine.device, engine.rung) == (["undo cpu"], "cuda", "hqq3")
    undone = [done for _ in range(3 * CALM_ANSWERS) if (done := ask(agent)[0])]
    (engine,) = chain._models.engines.values()
    assert (undone, engine.rung) == ([["undo lower_rung"]] * 3, "bf16")
    assert not chain._given_up.steps


def test_an_engine_that_cannot_be_started_again_is_left_for_the_one_that_answered():
    card, starts = Card(12_000), []

    def opened():
        starts.append(card.limit)
        if len(starts) > 1:
            raise EngineError("vLLM has not loaded it within 600 s")
        return Fixed(card, 1.0, "bf16", "cuda", 0)

    chain = fixed_chain(card)
    chain.links[0] = dataclasses.replace(chain.links[0], open=opened)
    agent = agent_of(chain=chain, max_new_tokens=500)
    agent.load()
    card.limit = 5_000
    assert ask(agent)[0] == ["lower_rung"]
    card.limit = 20_000
    found = [ask(agent) for _ in range(4 * CALM_ANSWERS)]
    assert {result.state for _, result in found} == {"answered"}
    assert [done for done, _ in found if done] == [["undo lower_rung", "lower_rung"]] * 2  # the second time later
    assert len(starts) == 3


def test_an_engine_whose_process_dies_while_it_is_opened_is_opened_anew(tmp_path):
    card, opened = Card(12_000), []

    class Dying(CardEngine):
        def load_adapter(self, adapter, folder):
            opened.append(self)
            if len(opened) < 3:
                raise EngineBroken("the vLLM process ended with SIGSEGV")

    link = Link("primary", "one", lambda: Dying(card, 1.0, "bf16", "cuda", 0), adapter="a", adapter_folder=tmp_path)
    result = agent_of(chain=Chain([link])).ask("Who?")
    assert (result.state, len(opened), len(result.fallbacks)) == ("answered", 3, 2)
    assert [engine.closed for engine in opened] == [True, True, False]


def test_an_adapter_that_cannot_be_loaded_does_not_bar_its_model(tmp_path):
    card = Card(12_000)

    class Picky(CardEngine):
        def adapters(self):
            return []

        def load_adapter(self, adapter, folder):
            if adapter == "bad":
                raise AdapterError("adapter bad has rank 128; allowed: up to 64")

    chain = Chain([Link("primary", "one", lambda: Picky(card, 1.0, "bf16", "cuda", 0))])
    agent = agent_of(chain=chain)
    for adapter, state in (("bad", "failed"), ("bad", "failed"), ("good", "answered"), ("good", "answered")):
        chain.use(dataclasses.replace(chain.links[0], adapter=adapter, adapter_folder=tmp_path))
        result = agent.ask("Who?")
        assert (result.state, "rank 128" in result.error) == (state, state == "failed")


def test_a_server_is_not_closed_for_its_memory():
    card = Card(12_000)
    served = CardEngine(card, 0.1, "bf16", "cpu", 0)
    served.is_elsewhere = True
    served.footprint = lambda adapter=None: None
    chain = chain_on(card, adapters=0)
    chain.links.append(Link("fallback", "served", lambda: served))
    chain.current()
    chain.fall("its words were unusable", broken=False)
    chain.current()
    chain.rewind()
    chain.take_news()
    card.limit = 8_300
    assert ask(agent_of(chain=chain, max_new_tokens=500))[0] == ["lower_rung"]
    assert not served.closed


class Demanding(CardEngine):
    """A model whose shortest call takes so many tokens."""

    least = 0

    def stream(self, request, should_stop=lambda: False):
        if request.max_new_tokens < self.least:
            raise LimitTooSmallError(f"max_new_tokens {request.max_new_tokens} is too small for any call")
        yield from super().stream(request, should_stop)


def test_a_demanded_call_that_a_shrunken_context_has_no_room_for_gets_it_back():
    card = Card(14_000)
    link = Link("primary", "one", lambda: Demanding(card, 1.0, "bf16", "cuda", 0))
    agent = agent_of(chain=Chain([link], card.free), max_new_tokens=256)
    agent.load()
    card.limit = 8_000 + 600
    assert ask(agent, options=dataclasses.replace(agent.options, max_new_tokens=2_000))[0] == ["shrink_context"] * 2
    (engine,) = agent.chain._models.engines.values()
    assert engine.context == 512
    engine.least = 100
    card.limit = 14_000
    done, result = ask(agent, "word " * 350)  # 440 tokens
    assert (result.state, result.refused) == ("answered", None)
    assert done == ["undo shrink_context"]
    assert 440 + 256 <= engine.context < 4096
    wide = engine.context
    for _ in range(6 * CALM_ANSWERS):  # what is undone afterwards never shrinks what an answer needed
        ask(agent)
        assert engine.context >= wide
    assert engine.context == 4096
