"""The vLLM engine where its process fails: one that speaks as vLLM's does, and fails when it is told to.

What goes wrong here (a refusal that comes late, a process that hangs, weights that vLLM cannot take) cannot be had from
vLLM on demand. The engine, the process and their conversation are the real ones.
"""

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from conformance import CHAT
from engine_adapters import random_lora

from agentlab import adapters as adapter_room
from agentlab import models
from agentlab.errors import AdapterError
from agentlab.inference import EngineError, OutOfMemoryError, Request, vllm_build, vllm_engine, vllm_worker
from agentlab.inference.contract import EngineBroken
from agentlab.inference.vllm_engine import VllmEngine
from agentlab.inference.worker_process import ChildProcess

# Writes three tokens, one at a time, whatever is asked, and is silent where more are wanted. A temperature of 3 is
# refused, and not before the next message came; an adapter is refused while a file says why. It answers to requests
# for adapters that it holds.
SPEAKER = """
import pathlib, time
from agentlab.inference.worker_process import die_with_parent, parents_channel
die_with_parent()
channel = parents_channel()
channel.receive()
channel.send({"ready": {}})
refused, held = None, []
why = pathlib.Path(__file__).with_name("refuse")
while True:
    message = channel.receive()
    if refused is not None:
        channel.send({"refused": refused, "why": "a temperature of 3"})
        refused = None
    if "answer" in message and message["temperature"] == 3:
        refused = message["answer"]
    elif "answer" in message:
        assert message["adapter"] is None or message["adapter"][1] in [1, *held]
        for token, finish in ((68, None), (69, None), (70, "length" if message["max_tokens"] == 3 else None)):
            channel.send({"step": [[message["answer"], [token], None, finish, 0]], "at": time.monotonic()})
    elif message.get("what") == "load" and why.exists():
        channel.send({"error": message["call"], "why": why.read_text()})
    elif "call" in message:
        if message["what"] == "load":
            held.append(message["adapter"][1])
        if message["what"] == "unload":
            held.remove(message["number"])
        channel.send({"result": message["call"], "value": held})
"""


@pytest.fixture
def engine(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "speaker.py").write_text(SPEAKER)
    monkeypatch.setattr(vllm_build, "build", lambda: "cpu")  # whatever is installed: its process is not started
    path = os.pathsep.join([str(tmp_path), *sys.path])
    monkeypatch.setattr(
        vllm_engine, "ChildProcess", lambda module, env: ChildProcess("speaker", env | {"PYTHONPATH": path})
    )
    with VllmEngine(models.resolve(str(tiny_model))) as engine:
        yield engine


def answer(engine, **wanted):
    return engine.generate([Request(CHAT, max_new_tokens=3, **wanted)])[0].token_ids


def test_a_refusal_of_a_request_that_was_given_up_is_not_the_next_ones(engine):
    refused = Request(CHAT, temperature=3.0)
    assert [chunk.completion.finish_reason for chunk in engine.stream(refused, lambda: True)] == ["cancelled"]
    assert answer(engine) == [68, 69, 70]
    assert answer(engine) == [68, 69, 70]


def test_a_refusal_is_raised_for_the_request_that_it_is_about(engine):
    with pytest.raises(EngineError, match="vLLM refuses the request: a temperature of 3"):
        engine.generate([Request(CHAT, temperature=3.0), Request(CHAT, max_new_tokens=3)])
    assert answer(engine) == [68, 69, 70]


def test_a_process_that_hangs_is_noticed(engine, monkeypatch):
    monkeypatch.setattr(vllm_engine, "SILENCE_S", 0.3)
    assert answer(engine) == [68, 69, 70]
    os.kill(engine._child.pid, signal.SIGSTOP)
    with pytest.raises(EngineBroken, match=r"has said nothing for 0\.3 s"):
        answer(engine)
    assert not engine.is_running


@pytest.mark.parametrize(("how", "expected"), [(signal.SIGKILL, OutOfMemoryError), (signal.SIGTERM, EngineBroken)])
def test_a_process_that_the_kernel_kills_while_it_answers_lacked_memory(engine, how, expected):
    stream = engine.stream(Request(CHAT, max_new_tokens=200))
    next(stream)
    os.kill(engine._child.pid, how)
    with pytest.raises(EngineError, match=f"the vLLM process ended with {how.name}") as caught:
        list(stream)
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    ("why", "expected"), [("no such shape", AdapterError), ("CUDA out of memory", OutOfMemoryError)]
)
def test_an_adapter_that_vllm_cannot_load_again_stays_as_it_was(engine, tiny_model, tmp_path, why, expected):
    adapter_room.save(random_lora(tiny_model, 1), tmp_path / "first")
    adapter_room.save(random_lora(tiny_model, 2), tmp_path / "second")
    engine.load_adapter("one", tmp_path / "first")
    (tmp_path / "refuse").write_text(why)
    with pytest.raises(expected, match=why):
        engine.load_adapter("one", tmp_path / "second")
    assert engine.adapters() == ["one"]
    assert answer(engine, adapter="one") == [68, 69, 70]
    (tmp_path / "refuse").unlink()
    engine.load_adapter("one", tmp_path / "second")
    assert answer(engine, adapter="one") == [68, 69, 70]
    assert engine._call("held") == [4]  # the first, 2, has left vLLM; 1 is the adapter of zeros


def test_a_step_that_reads_for_long_is_a_sign_of_life_and_one_that_does_nothing_is_none(monkeypatch):
    monkeypatch.setattr(vllm_worker, "LONG_STEP_S", 0.05)
    said = []
    worker = vllm_worker.Worker.__new__(vllm_worker.Worker)
    worker.channel = SimpleNamespace(send=said.append)
    for seconds, expected in ((0.0, []), (0.06, [[]])):
        worker.engine = SimpleNamespace(step=lambda seconds=seconds: time.sleep(seconds) or [])
        worker._step()
        assert [message["step"] for message in said] == expected
