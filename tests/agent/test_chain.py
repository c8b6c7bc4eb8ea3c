"""Falling from model to model: on load failure, out of memory, a broken engine, unusable output."""

import dataclasses

import pytest
import torch
from helpers import Scripted, agent_of, chain_of

from agentlab.errors import ModelError
from agentlab.events import RecoveryStep
from agentlab.hardware.recovery import Footprint
from agentlab.inference import EngineError, OutOfMemoryError
from agentlab.inference.chain import Chain, ChainExhausted, Link
from agentlab.inference.contract import EngineBroken
from agentlab.inference.lineup import REST_S
from agentlab.inference.openai_server import RefusedByServer, ServerError, Unreachable

FAULTS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OutOfMemoryError("not even one request fits into the device's memory"),
    MemoryError(),
    OSError("the worker is gone"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_broken_engine_hands_over_to_the_fallback_and_is_freed(fault):
    primary, fallback = Scripted(fault), Scripted("I can.")
    agent = agent_of(chain=chain_of(primary, fallback))
    steps = list(agent.run("Who can?"))
    assert [s.kind for s in steps if s.kind != "delta"] == ["fell_back", "generated", "answered"]
    result = steps[-1].result
    assert (result.final_answer, result.model_info.role) == ("I can.", "fallback")
    assert len(result.fallbacks) == 1
    assert primary.closed
    again = agent.ask("And now?")  # it is not tried again
    assert (again.final_answer, again.fallbacks) == ("I can.", [])


def test_models_that_cannot_be_loaded_are_passed_over():
    chain = chain_of(ModelError("no such model"), MemoryError(), Scripted("Last."))
    result = agent_of(chain=chain).ask("Who?")
    assert result.final_answer == "Last."
    assert result.model_info.role == "emergency"
    assert ["no such model" in result.fallbacks[0], "cannot be loaded" in result.fallbacks[1]] == [True, True]


def on_two_engines(first, second):
    """(the chain of one model whose usual engine gives `first`, what was opened)."""
    opened = []

    def opener(engine):
        def opened_now():
            opened.append(engine)
            if isinstance(engine, BaseException):
                raise engine
            return engine

        return opened_now

    return Chain([Link("primary", "m", opener(first), otherwise=lambda: opener(second))]), opened


def test_a_model_whose_chosen_engine_does_not_start_is_opened_on_the_other_for_good():
    refused, other = EngineError("vLLM cannot load m: no kernel image"), Scripted("Yes.", "Still.")
    chain, opened = on_two_engines(refused, other)
    agent = agent_of(chain=chain)
    result = agent.ask("Are you there?")
    assert result.final_answer == "Yes."
    (told,) = result.fallbacks
    assert told == "m → m: m cannot be loaded: vLLM cannot load m: no kernel image; it is opened on another engine"
    assert (agent.ask("And now?").final_answer, opened) == ("Still.", [refused, other])


def test_a_model_that_breaks_on_both_of_its_engines_is_given_up():
    chain, opened = on_two_engines(Scripted(OSError("one")), Scripted(OSError("two")))
    result = agent_of(chain=chain).ask("Are you there?")
    assert (result.state, result.error, len(opened)) == ("failed", "m broke: two", 2)
    assert not chain.usable


def test_a_process_that_dies_too_often_hands_over_to_the_other_engine():
    died = [Scripted(EngineBroken("the vLLM process died")) for _ in range(4)]
    left = iter(died)
    link = Link("primary", "m", lambda: next(left), otherwise=lambda: lambda: Scripted("Yes."))
    result = agent_of(chain=Chain([link])).ask("Are you there?")
    assert result.final_answer == "Yes."
    assert [engine.closed for engine in died] == [True, True, True, False]  # the last one was never opened
    assert ["opened anew" in told for told in result.fallbacks] == [True, True, False]
    assert "another engine" in result.fallbacks[-1]


class Down:
    """A server that cannot be reached until it is `up`; counts who asks, as of a clock that stands still."""

    def __init__(self):
        self.up, self.asked, self.time_s = False, 0, 0.0

    def open(self):
        self.asked += 1
        if not self.up:
            raise ServerError("the server cannot be reached")
        return Scripted("I am up.")

    def link(self, role="primary"):
        return Link(role, f"model-{role}", self.open)

    def clock(self):
        return self.time_s


def test_a_server_that_is_down_is_asked_again_after_a_while_and_not_before():
    server = Down()
    chain = Chain([server.link(), link_of("emergency", Scripted("Meanwhile."))], clock=server.clock)
    agent = agent_of(chain=chain)
    results = [agent.ask("Who?") for _ in range(3)]
    assert [result.final_answer for result in results] == ["Meanwhile."] * 3
    assert [len(result.fallbacks) for result in results] == [1, 0, 0]
    assert "the server cannot be reached" in results[0].fallbacks[0]
    server.time_s = REST_S - 1
    agent.ask("Who?")
    assert server.asked == 1
    server.time_s = REST_S
    assert agent.ask("Who?").final_answer == "Meanwhile."  # it is down still
    assert server.asked == 2
    server.up, server.time_s = True, 2 * REST_S
    result = agent.ask("Who?")
    assert (result.final_answer, result.model_info.role, result.fallbacks) == ("I am up.", "primary", [])


def test_a_server_that_goes_away_is_no_model_that_is_left_but_asked_where_there_is_no_other():
    server = Down()
    gone = Scripted(*[Unreachable("the server cannot be reached or broke off")] * 2, "I am back.")
    agent = agent_of(chain=Chain([Link("primary", "m", lambda: gone)], clock=server.clock))
    result = agent.ask("Who?")
    assert (result.state, result.error) == ("failed", "m: the server cannot be reached or broke off")
    assert not agent.chain.usable  # which /health says
    assert agent.ask("Who?").state == "failed"
    assert len(gone.requests) == 2
    assert agent.ask("Who?").final_answer == "I am back."
    server.time_s = REST_S
    assert agent.chain.usable


def test_a_server_that_goes_away_is_left_to_others_for_a_while():
    server = Down()
    gone = Scripted(Unreachable("the server cannot be reached or broke off"), "I am back.")
    links = [Link("primary", "m", lambda: gone), link_of("emergency", Scripted("Meanwhile.", "Still."))]
    agent = agent_of(chain=Chain(links, clock=server.clock))
    assert [agent.ask("Who?").final_answer for _ in range(2)] == ["Meanwhile.", "Still."]
    assert len(gone.requests) == 1
    server.time_s = REST_S
    assert agent.ask("Who?").final_answer == "I am back."


def test_where_the_only_model_is_on_a_server_that_is_down_the_chain_says_so_and_is_usable_again_later():
    server = Down()
    agent = agent_of(chain=Chain([server.link()], clock=server.clock))
    for _ in range(2):
        result = agent.ask("Who?")
        assert (result.state, result.error) == (
            "failed", "model-primary cannot be loaded: the server cannot be reached"
        )  # fmt: skip
        assert not agent.chain.usable
    server.up, server.time_s = True, REST_S
    assert agent.chain.usable
    assert agent.ask("Who?").final_answer == "I am up."


@pytest.mark.parametrize("error", [RefusedByServer("status 401"), ModelError("the server has no model x")])
def test_a_server_that_answers_and_refuses_is_not_asked_again(error):
    server = Down()
    opened = []

    def refuse():
        opened.append(1)
        raise error

    links = [Link("primary", "model-primary", refuse), link_of("fallback", Scripted("I can."))]
    agent = agent_of(chain=Chain(links, clock=server.clock))
    assert agent.ask("Who?").final_answer == "I can."
    server.time_s = 9 * REST_S
    assert agent.ask("Who?").final_answer == "I can."
    assert len(opened) == 1


def test_a_model_whose_server_is_down_is_no_smaller_model_for_one_that_runs_out_of_memory():
    server = Down()
    small = Scripted("On the CPU.")
    first = dataclasses.replace(
        link_of("primary", Scripted(torch.OutOfMemoryError("CUDA out of memory"))), reopen=lambda rung, on_cpu: small
    )
    chain = Chain([first, server.link("fallback")], clock=server.clock)
    chain.fall("asked for", broken=False)
    with pytest.raises(ChainExhausted):
        chain.current()  # the server rests
    assert agent_of(chain=chain).ask("Who?").final_answer == "On the CPU."
    assert server.asked == 1


def test_when_nobody_is_left_it_fails_honestly():
    agent = agent_of(chain=chain_of(Scripted(RuntimeError("first")), Scripted(RuntimeError("second"))))
    result = agent.ask("Who?")
    assert result.state == "failed"
    assert result.final_answer == ""
    assert "second" in result.error
    assert agent.ask("Who?").state == "failed"


def test_one_model_alone_says_what_is_wrong_with_it():
    with pytest.raises(ChainExhausted, match="no such model"):
        agent_of(chain=chain_of(ModelError("no such model"))).load()


def test_a_request_that_no_model_could_take_is_not_a_broken_engine():
    from agentlab.errors import AdapterError

    primary, fallback = Scripted(AdapterError("adapter x is not loaded")), Scripted("no")
    result = agent_of(chain=chain_of(primary, fallback)).ask("Hm?")
    assert result.state == "failed"
    assert "adapter x is not loaded" in result.error
    assert not primary.closed
    assert fallback.requests == []


def test_room_is_made_for_a_fallback_that_does_not_fit_beside_the_first():
    primary = Scripted("", "")
    fallback = Scripted("I fit alone.")
    chain = chain_of(primary, fallback)
    opened = chain.links[1].open

    def only_alone():
        if not primary.closed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return opened()

    object.__setattr__(chain.links[1], "open", only_alone)
    result = agent_of(chain=chain).ask("Hm?")
    assert result.final_answer == "I fit alone."
    assert result.fallbacks[1:] == ["model-fallback: close idle model-primary → none: CUDA out of memory"]
    assert primary.closed


GONE = EngineBroken("the vLLM process ended with SIGKILL")


def link_of(role, *engines):
    """A model whose first opening gives the first of `engines`, the next one the next."""
    left = iter(engines)
    return Link(role, f"model-{role}", lambda: next(left))


def test_an_engine_whose_process_died_is_opened_anew():
    dead, alive = Scripted(GONE), Scripted("I am back.")
    agent = agent_of(chain=Chain([link_of("primary", dead, alive)]))
    result = agent.ask("Who?")
    assert (result.state, result.final_answer, dead.closed) == ("answered", "I am back.", True)
    assert result.fallbacks == [
        "model-primary → model-primary: model-primary broke: the vLLM process ended with SIGKILL; it is opened anew"
    ]
    again = agent.ask("And now?")
    assert (again.final_answer, again.fallbacks) == ("I am back.", [])


def test_a_process_that_dies_again_and_again_hands_over_for_good():
    dead = [Scripted(GONE) for _ in range(3)]
    agent = agent_of(chain=Chain([link_of("primary", *dead), link_of("fallback", Scripted("I can."))]))
    result = agent.ask("Who?")
    assert (result.final_answer, result.model_info.role) == ("I can.", "fallback")
    assert [engine.closed for engine in dead] == [True] * 3
    assert len(result.fallbacks) == 3
    again = agent.ask("And now?")
    assert (again.final_answer, again.fallbacks) == ("I can.", [])


def test_each_answer_may_open_a_dead_engine_anew():
    chain = Chain([link_of("primary", *[Scripted("Yes.", GONE) for _ in range(6)])])
    agent = agent_of(chain=chain)
    assert [agent.ask("Who?").final_answer for _ in range(6)] == ["Yes."] * 6


def test_what_an_engine_refuses_does_not_close_it():
    primary = Scripted(EngineError("the prompt is too long"), "Shorter.")
    agent = agent_of(chain=chain_of(primary, Scripted("I can.")))
    assert agent.ask("Who?").final_answer == "I can."
    assert not primary.closed
    assert agent.ask("Shorter?").final_answer == "Shorter."


def test_an_adapter_that_a_dead_engine_cannot_load_waits_for_the_new_one(tmp_path):
    class Dead(Scripted):
        def load_adapter(self, adapter, folder):
            raise GONE

    class Alive(Scripted):
        def load_adapter(self, adapter, folder):
            self.loaded = adapter

    dead, alive = Dead("no"), Alive("With it.")
    chain = Chain([link_of("primary", dead, alive)])
    agent = agent_of(chain=chain)
    agent.load()
    chain.use(dataclasses.replace(chain.links[0], adapter="a", adapter_folder=tmp_path))
    assert agent.ask("Who?").final_answer == "With it."
    assert (dead.closed, alive.loaded) == (True, "a")


class Crowded(Scripted):
    """A model that memory does not suffice for beside another one."""

    def __init__(self, *replies, beside):
        super().__init__(*replies)
        self.beside = beside

    def footprint(self, adapter=None):
        return Footprint("cuda", self.context, 1, "bf16", {"bf16": 8000, "nf4": 2300})

    def relieve(self, action, adapter=None):
        raise AssertionError(f"it gave up {action.kind} for a model that does nothing")

    def stream(self, request, should_stop=lambda: False):
        if self.beside.requests and not self.beside.closed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from super().stream(request, should_stop)


def test_a_model_that_is_kept_for_later_gives_way_before_the_one_that_answers_gives_something_up():
    fallback = Scripted("Meanwhile.")
    primary = Crowded("", "", "I have room.", beside=fallback)
    agent = agent_of(chain=chain_of(primary, fallback))
    assert agent.ask("Hm?").final_answer == "Meanwhile."
    assert agent.chain.loaded() == ["model-primary", "model-fallback"]
    result = agent.ask("And now?")
    assert (result.final_answer, result.model_info.role) == ("I have room.", "primary")
    assert result.fallbacks == ["model-primary: close idle model-fallback → none: CUDA out of memory"]
    assert agent.chain.loaded() == ["model-primary"]


def test_what_an_engine_gives_up_by_itself_is_told_each_time():
    step = RecoveryStep(model="m", action="shrink_batch", source="4", target="2", bytes_expected=0, reason="no room")
    engine = Scripted(lambda request: engine.tell(step) or "Yes.")
    agent = agent_of(chain=chain_of(engine))
    told = ["m: shrink batch 4 → 2: no room"]
    assert agent.ask("Who?").fallbacks == []  # it is told when it is the chain's turn to speak
    assert agent.ask("Who?").fallbacks == told
    assert agent.ask("Who?").fallbacks == told


def test_another_engine_than_the_one_that_scored_a_model_is_told():
    link = dataclasses.replace(link_of("primary", Scripted("Yes.", GONE), Scripted("Yes.")), engine="vllm")
    agent = agent_of(chain=Chain([link]))
    (told,) = agent.ask("Who?").fallbacks
    assert told == "model-primary → model-primary: its scores are vllm's, and scripted answers"
    assert agent.ask("Who?").fallbacks[-1] == told  # each time that it is opened
    chain = chain_of(Scripted("Yes."))
    assert agent_of(chain=Chain([dataclasses.replace(chain.links[0], engine="scripted")])).ask("Who?").fallbacks == []


class Slots(Scripted):
    """Remembers what is pinned, as an engine with places on a device does; `full`: every place is taken."""

    def __init__(self, *replies, full=False):
        super().__init__(*replies)
        self.full, self.there, self.kept = full, [], []

    def load_adapter(self, adapter, folder):
        self.there.append(adapter)

    def adapters(self):
        return self.there

    def pin(self, adapter):
        if self.full:
            raise EngineError("no slot is left")
        self.kept.append(adapter)


@pytest.mark.parametrize("full", [False, True])
def test_the_adapter_that_stays_is_pinned_also_on_an_engine_opened_anew(tmp_path, full):
    first, second = Slots("One.", GONE, full=full), Slots("Two.", full=full)
    link = dataclasses.replace(
        link_of("primary", first, second), adapter="a", adapter_folder=tmp_path, adapter_sha256="1", pinned=True
    )
    chain = Chain([link])
    agent = agent_of(chain=chain)
    assert agent.ask("Who?").final_answer == "One."
    chain.use(dataclasses.replace(link, adapter="b", pinned=False))
    chain.use(link)
    assert agent.ask("Who?").final_answer == "Two."
    assert (first.kept, second.kept) == (([], []) if full else (["a", "a"], ["a"]))
