"""Falling from model to model: on load failure, out of memory, a broken engine, unusable output."""

import pytest
import torch
from helpers import Scripted, agent_of, chain_of

from agentlab.errors import ModelError
from agentlab.inference import OutOfMemoryError
from agentlab.inference.chain import ChainExhausted

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
    assert agent_of(chain=chain).ask("Hm?").final_answer == "I fit alone."
    assert primary.closed
