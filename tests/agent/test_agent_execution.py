"""Tools that hang, raise, flood and return nonsense: each gives a short observation, on time."""

import asyncio
import contextlib
import dataclasses
import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import psutil
import pytest

from agentlab.agent import execute, tool
from agentlab.agent.tools import capture


def run(function, arguments=None, *, timeout_s=5.0, should_stop=lambda: False, **options):
    return execute(tool(function, **options), arguments or {}, timeout_s=timeout_s, should_stop=should_stop)


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __repr__


class HostileError(Exception):
    def __str__(self):
        raise RuntimeError("no")


def lambda_free(function):
    """`function`, which may be a lambda, as one that a tool can be made of."""

    def named() -> None:
        function()

    return named


def cyclic():
    values = [1]
    values.append(values)
    return values


def deep():
    values = []
    for _ in range(100_000):
        values = [values]
    return values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Kyoto\n", "Kyoto\n"),
        ({"a": [1, 2.5, True, None]}, '{"a": [1, 2.5, true, null]}'),
        (397.8, "397.8"),
        (False, "false"),
        (math.nan, "NaN"),
        ({"x": math.inf}, '{"x": Infinity}'),
        ({1: "a"}, '{"1": "a"}'),
        ({(1, 2): "a"}, "{(1, 2): 'a'}"),
        ({3, 1}, "[1, 3]"),
        (b"\x00\xffab", "4 bytes: b'\\x00\\xffab'"),
        ("half \ud800 pair", "half � pair"),
        ({"a": "\udfff"}, '{"a": "�"}'),
        ("\x1b[31mred\x00\x85", "␛[31mred␀�"),
        ("a\r\nb\rc", "a\nb\nc"),
        (None, "done; nothing was returned or printed"),
    ],
)
def test_results_become_text(value, text):
    def function():
        """Text."""
        return value

    seen = run(function)
    assert (seen.text, seen.ok, seen.problem, seen.truncated) == (text, True, None, False)
    json.dumps(seen.text).encode()
    seen.text.encode()


@pytest.mark.parametrize(
    ("make", "part"),
    [(cyclic, "Circular"), (deep, "nested"), (Hostile, "RuntimeError"), (object, "<object object"), (iter, "error")],
)
def test_results_that_json_cannot_hold_are_said_shortly(make, part):
    def function():
        """Text."""
        return make()

    seen = run(function)
    assert part.lower() in seen.text.lower() or not seen.ok
    assert len(seen.text) < 600


RAISED = [
    (ValueError("bad\nvalue"), "ValueError: bad value"),
    (SystemExit(3), "SystemExit: 3"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (GeneratorExit(), "GeneratorExit"),
    (asyncio.CancelledError(), "CancelledError"),
    (RuntimeError("x" * 10_000_000), "RuntimeError: " + "x" * 500),
]
# the class of a test cannot travel into a worker process, so it is raised in a thread only
IN_A_THREAD = (False, HostileError(), "HostileError: (its message cannot be shown)")


@pytest.mark.parametrize(
    ("isolated", "error", "text"), [*((way, *case) for way in (False, True) for case in RAISED), IN_A_THREAD]
)
def test_exceptions_are_observations(isolated, error, text):
    def function():
        """Text."""
        raise error

    seen = run(function, isolated=isolated)
    assert (seen.text, seen.ok, seen.problem) == (text, False, "error")


@pytest.mark.parametrize("isolated", [False, True])
def test_a_hanging_function_costs_its_timeout_and_no_more(isolated):
    def function():
        """Text."""
        print("began", flush=True)
        time.sleep(8)

    began = time.monotonic()
    seen = run(function, timeout_s=1.5, isolated=isolated)
    assert time.monotonic() - began < 7
    assert (seen.ok, seen.problem) == (False, "timeout")
    assert "timed out after 1.5 s" in seen.text
    assert "began" in seen.text
    assert ("killed" if isolated else "may still be running") in seen.text


def test_the_tools_own_timeout_counts_when_it_is_shorter():
    def function():
        """Text."""
        time.sleep(1)

    seen = execute(tool(function, timeout_s=0.1), {}, timeout_s=60)
    assert "timed out after 0.1 s" in seen.text


def test_no_time_left_is_said_without_running():
    ran = []

    def function():
        """Text."""
        ran.append(1)

    assert run(function, timeout_s=0).problem == "timeout"
    assert run(function, should_stop=lambda: True).problem == "cancelled"
    assert not ran


@pytest.mark.parametrize("isolated", [False, True])
def test_a_stop_is_heard_within_a_moment(isolated):
    def function():
        """Text."""
        time.sleep(8)

    began = time.monotonic()
    seen = run(function, should_stop=lambda: time.monotonic() - began > 0.3, timeout_s=20, isolated=isolated)
    assert time.monotonic() - began < 15
    assert seen.problem == "cancelled"


@pytest.mark.parametrize("isolated", [False, True])
def test_ten_megabytes_are_cut_to_head_and_tail(isolated):
    def function():
        """Text."""
        print("p" * 10_000_000)
        sys.stderr.write("e" * 10_000_000)
        return "first" + "x" * 10_000_000 + "last"

    seen = run(function, isolated=isolated, timeout_s=20)
    assert len(seen.text) <= 2000
    assert seen.truncated
    assert seen.ok
    assert seen.text.startswith("first")
    assert "last\nprinted: ppp" in seen.text
    assert "characters left out" in seen.text


def test_the_number_of_characters_left_out_is_exact():
    def function():
        """Text."""
        return "".join(chr(97 + i % 26) for i in range(5000))

    text = run(function).text
    head, note, tail = text.split("\n")
    assert note == f"[… {5000 - len(head) - len(tail)} characters left out …]"
    assert (head + tail).isalpha()
    whole = function()
    assert whole.startswith(head)
    assert whole.endswith(tail)


@pytest.mark.parametrize("isolated", [False, True])
def test_what_is_printed_stands_beside_the_result(isolated):
    def function():
        """Text."""
        print("hello")
        return 3

    assert run(function, isolated=isolated).text == "3\nprinted: hello"


def test_prints_are_caught_per_thread(capsys):
    stop = threading.Event()
    lines = []

    def other():
        while not stop.is_set():
            print("from the other thread")
            lines.append(1)
            time.sleep(0.001)

    def function():
        """Text."""
        for _ in range(20):
            print("mine")
            sys.stdout.buffer.write(b"bytes\n")
            time.sleep(0.002)

    thread = threading.Thread(target=other)
    thread.start()
    seen = run(function)
    stop.set()
    thread.join()
    assert seen.text.count("mine") == 20
    assert seen.text.count("bytes") == 20
    assert "other" not in seen.text
    out = capsys.readouterr().out
    assert out.count("from the other thread") == len(lines)
    assert "mine" not in out


def test_the_streams_are_the_old_ones_afterwards():
    for _ in range(1000):  # threads that earlier tests left behind
        if not capture._active:
            break
        time.sleep(0.01)
    before = (sys.stdout, sys.stderr)

    def function():
        """Text."""
        print("x")

    run(function)
    assert (sys.stdout, sys.stderr) == before
    with contextlib.redirect_stdout(io.StringIO()) as mine:
        run(function)
        print("y")
    assert mine.getvalue() == "y\n"


def test_a_stream_outlives_the_tool_for_a_print_that_is_still_writing_to_it():
    """`print` only borrows sys.stdout: if the object were freed under it, the process would crash."""
    seen = []
    for _ in range(3):
        assert run(lambda_free(lambda: seen.append(weakref.ref(sys.stdout)))).ok
    gc.collect()
    assert len({id(one()) for one in seen}) == 1
    assert seen[0]() is not None


@pytest.mark.parametrize("closing", ["sys.stdout.close()", "sys.stdout.detach().write(b'x')", "sys.stderr.close()"])
def test_a_tool_cannot_close_the_programs_streams(capsys, closing):
    assert run(lambda_free(lambda: exec(closing))).ok
    print("still here")
    print("and here", file=sys.stderr)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("still here\n", "and here\n")


def test_async_functions_are_run():
    async def function(x: int) -> int:
        """Text."""
        await asyncio.sleep(0.01)
        return x + 1

    assert run(function, {"x": 1}).text == "2"

    async def other():
        return run(function, {"x": 2}).text

    assert asyncio.run(other()) == "3"  # also from inside an event loop


@dataclasses.dataclass
class Leaves:
    code: int

    def __post_init__(self):
        raise SystemExit(self.code)


@dataclasses.dataclass
class Sleeps:
    seconds: int

    def __post_init__(self):
        time.sleep(self.seconds)


@pytest.mark.parametrize("isolated", [False, True])
def test_what_an_arguments_own_class_does_is_held_like_the_tool(isolated):
    def leave(how: Leaves) -> str:
        """Text."""
        return "ok"

    def sleep(long: Sleeps) -> int:
        """Text."""
        return long.seconds

    assert run(leave, {"how": {"code": 3}}, isolated=isolated).problem == "error"
    started = time.monotonic()
    assert run(sleep, {"long": {"seconds": 30}}, timeout_s=1.0, isolated=isolated).problem == "timeout"
    assert time.monotonic() - started < 5
    assert run(sleep, {"long": {"seconds": 0}}, isolated=isolated).text == "0"


def test_wrong_arguments_are_an_observation():
    def function(x: int) -> int:
        """Text."""
        return x

    assert run(function, {"y": 1}).problem == "error"
    assert "missing" in run(function, {}).text


def test_an_isolated_tool_that_kills_its_process_is_an_observation():
    def leave():
        """Text."""
        os._exit(3)

    def crash():
        """Text."""
        os.kill(os.getpid(), signal.SIGSEGV)

    assert run(leave, isolated=True).text == "no result: the process ended with exit code 3"
    assert run(crash, isolated=True).text == "no result: the process was killed by SIGSEGV"


def test_the_whole_process_group_is_killed(tmp_path):
    note = tmp_path / "pid"

    def function(path: str):
        """Text."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "60"])
        with open(path, "w") as file:
            file.write(str(child.pid))
        time.sleep(8)

    seen = run(function, {"path": str(note)}, timeout_s=3, isolated=True)
    assert seen.problem == "timeout"
    pid = int(note.read_text())
    _wait_until_gone(pid)


def _wait_until_gone(pid):
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # dead; its new parent has not looked yet
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} lives")


def test_a_grandchild_does_not_hold_the_answer_back():
    def function():
        """Text."""
        subprocess.Popen(["sleep", "30"])
        return "ok"

    began = time.monotonic()
    assert run(function, isolated=True, timeout_s=20).text == "ok"
    assert time.monotonic() - began < 10
