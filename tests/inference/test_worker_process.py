"""The child process of an engine: messages beside noise, its last words, and that it outlives nobody."""

import os
import signal
import subprocess
import sys
import time

import pytest

from agentlab.inference import OutOfMemoryError, worker_process
from agentlab.inference.contract import EngineBroken
from agentlab.inference.vllm_process import broken
from agentlab.inference.worker_process import ChildDied, ChildProcess

ECHO = """
import os, subprocess, sys
from agentlab.inference.worker_process import die_with_parent, end_group, parents_channel
die_with_parent()
channel = parents_channel()
while True:
    try:
        message = channel.receive()
    except EOFError:
        end_group()
    print("noise", message, flush=True)
    os.write(1, bytes(range(256)))
    for line in message.get("say", []):
        print(line, file=sys.stderr, flush=True)
    if "die" in message:
        print("the last words", file=sys.stderr, flush=True)
        os._exit(3)
    if "spawn" in message:
        message["pid"] = subprocess.Popen(["sleep", "600"]).pid
    channel.send(message)
"""


@pytest.fixture
def env(tmp_path):
    (tmp_path / "echo_child.py").write_text(ECHO)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


@pytest.fixture
def child(env):
    child = ChildProcess("echo_child", env)
    yield child
    child.kill()


def is_gone(pid):
    """Whether the process ends within a while; a zombie has ended."""
    for _ in range(600):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def listen(child):
    while True:
        child.receive()


def test_a_cause_that_is_printed_long_before_the_end_is_found(child):
    told = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB. " + "See documentation. " * 40
    child.send({"say": [told, *["cleaning up"] * 20], "die": True})
    with pytest.raises(ChildDied) as caught:
        listen(child)
    assert "out of memory" not in str(caught.value)
    assert isinstance(broken(caught.value), OutOfMemoryError)
    for how, expected in ((signal.SIGSEGV, EngineBroken), (signal.SIGKILL, OutOfMemoryError)):  # the kernel's way
        assert type(broken(ChildDied(f"ended with {how.name}", "all was well", -how))) is expected


def test_messages_pass_whole_whatever_is_printed(child):
    for message in ({"text": "ü" * 100_000}, {"nested": [1, None, {"a": -0.5}]}, {}):
        child.send(message)
        assert child.receive() == message
    assert child.receive(0.01) is None
    assert "noise" in child.log()


def test_a_dead_child_is_quoted(child):
    child.send({"die": True})
    with pytest.raises(ChildDied, match=r"ended with exit code 3; its log ends: .*the last words"):
        child.receive()
    assert not child.is_alive()
    with pytest.raises(ChildDied, match="exit code 3") as caught:
        child.receive()
    assert caught.value.code == 3


def test_a_signal_that_ended_a_child_is_told(child):
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied, match="ended with SIGKILL") as caught:
        child.receive()
    assert caught.value.code == -signal.SIGKILL


def test_a_child_that_takes_nothing_any_more_went_silent(child, monkeypatch):
    child.send({})
    assert child.receive() == {}
    monkeypatch.setattr(worker_process, "SEND_S", 0.2)
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(ChildDied, match="went silent"):
        child.send({"text": "x" * 2**22})  # more than a socket holds


def test_killing_takes_what_it_started_along(child):
    child.send({"spawn": True})
    grandchild = child.receive()["pid"]
    child.kill()
    child.kill()
    assert is_gone(child.pid)
    assert is_gone(grandchild)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_the_process_that_started_it(env, how):
    program = (
        "import os, time\n"
        "from agentlab.inference.worker_process import ChildProcess\n"
        "child = ChildProcess('echo_child', dict(os.environ))\n"
        "child.send({'spawn': True})\n"
        "print(child.pid, child.receive()['pid'], flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    assert all(is_gone(pid) for pid in pids)
