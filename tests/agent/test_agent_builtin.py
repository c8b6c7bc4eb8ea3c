"""The tools that come along, called as the agent calls them."""

import datetime
import re
import sys
import time

import pytest
from memory.helpers import open_memory

from agentlab.agent import execute
from agentlab.agent.tools import builtin, sandbox
from agentlab.agent.tools.arithmetic import calculate
from agentlab.agent.tools.sandbox import run_python
from agentlab.errors import ToolError
from agentlab.hardware import monitor
from agentlab.toolformat import check_tool, signature


def use(made, **arguments):
    return execute(made, arguments, timeout_s=20)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("1 + 2 * 3", "7"),
        ("17 % of 2340", "397.8"),
        ("15% of 80", "12"),
        ("2 + 15% of 80", "14"),
        ("(10 + 5)% of 80", "12"),
        ("17 percent of 2340", "397.8"),
        ("20% * 50", "10"),
        ("50%", "0.5"),
        ("10% - 3", "-2.9"),
        ("17 % 5", "2"),
        ("17 % -5", "-3"),
        ("17 % (2 + 3)", "2"),
        ("1,234.5", "1234.5"),
        ("1,234,567 + 1", "1234568"),
        ("(1,234 + 1) * 2", "2470"),
        ("max(100,200)", "200"),
        ("2.5e3", "2500"),
        ("6 × 7", "42"),
        ("7 ÷ 2", "3.5"),
        ("2^10", "1024"),
        ("5²", "25"),
        ("−3 + 5", "2"),
        ("１２＋３", "15"),
        ("0.1 + 0.2", "0.3"),
        ("2340 * 0.17", "397.8"),
        ("1.1 * 1.1", "1.21"),
        ("1 / 3", "0.333333333333333"),
        ("6 / 2", "3"),
        ("7 // 2", "3"),
        ("2 ** -1", "0.5"),
        ("sqrt(16)", "4"),
        ("√16", "4"),
        ("√(9 + 16)", "5"),
        ("5!", "120"),
        ("factorial(20)", "2432902008176640000"),
        ("round(2.567, 1)", "2.6"),
        ("min(3, 1, 2) + max(1, 2)", "3"),
        ("sum(1, 2, 3)", "6"),
        ("sum([0.1, 0.2])", "0.3"),
        ("log(100, 10)", "2"),
        ("ln(e)", "1"),
        ("sin(pi / 2)", "1"),
        ("floor(2.7) + ceil(2.1)", "5"),
        ("abs(-3)", "3"),
        ("exp(0)", "1"),
        ("2 + 2 =", "4"),
        ("10**20", "100000000000000000000"),
        ("1e300", "1e300"),
        ("SQRT(4)", "2"),
    ],
)
def test_the_calculator_understands(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9**9**9", "too large"),
        ("9.0**9**9", "too large"),
        ("factorial(10**6)", "factorial of 1000000 is too large"),
        ("factorial(1000) ** 9", "too large"),
        ("10**3000 * 10**3000", "too large"),
        ("1e308 * 10", "too large"),
        ("exp(1000)", "too large"),
        ("1 / 0", "division by zero"),
        ("5 % 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("sqrt(-1)", r"sqrt\(-1\) has no real result"),
        ("log(0)", "no real result"),
        ("(-8) ** 0.5", "-8 to the power of 0.5 has no real result"),
        ("factorial(2.5)", "no real result"),
        ("", "empty"),
        ("2 +", "is not an expression"),
        ("2 2", "is not an expression"),
        ("2(3 + 4)", "write 2 "),
        ("1.234,5", "comma"),
        ("max(1,500, 1,200)", "write 1500"),
        ("200 + 10%", "of what"),
        ("10 / 5% of 80", "parentheses"),
        ("x + 1", "unknown name x"),
        ("open('f')", "unknown function open"),
        ("sqrt(1, 2)", "sqrt takes 1 number, not 2"),
        ("max()", "max takes at least 1 numbers, not 0"),
        ("__import__('os').system('true')", "only numbers|before a parenthesis|unknown"),
        ("(1).__class__", "only numbers"),
        ("[1, 2]", "only numbers"),
        ("'a' * 10**9", "only numbers"),
        ("True + 1", "unknown name true"),
        ("1 < 2", "only numbers"),
        ("(lambda: 1)()", "before a parenthesis"),
        ("round(1, 10**9)", "allowed: a whole number"),
        ("(" * 400 + "1" + ")" * 400, "is not an expression"),
        ("10%-3", "not clear whether"),
        ("1" * 2000, "2000 characters"),
        ("\x00", "is not an expression"),
        ("1j * 2", "only numbers"),
    ],
)
def test_the_calculator_refuses_in_one_line(expression, message):
    began = time.monotonic()
    with pytest.raises(ToolError, match=message) as caught:
        calculate(expression)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15
    seen = use(builtin.calculator(), expression=expression)
    assert (seen.ok, seen.problem, seen.text) == (False, "error", seen.text)
    assert not seen.text.startswith("ToolError")


def test_now_is_now():
    text = use(builtin.now()).text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d, \w+day, .+ \(UTC[+-]\d\d:\d\d\)", text)
    told = datetime.datetime.strptime(text[:19], "%Y-%m-%d %H:%M:%S")
    assert abs((told - datetime.datetime.now()).total_seconds()) < 10
    assert told.strftime("%A") in text


def test_now_elsewhere():
    text = use(builtin.now(), timezone="Asia/Tokyo").text
    assert text.endswith("Asia/Tokyo (UTC+09:00)")
    tokyo = datetime.datetime.now(datetime.timezone(datetime.timedelta(hours=9)))
    told = datetime.datetime.strptime(text[:19], "%Y-%m-%d %H:%M:%S")
    assert abs((told - tokyo.replace(tzinfo=None)).total_seconds()) < 10


@pytest.mark.parametrize("zone", ["Nowhere/City", "../../etc/passwd", "Europe", "/etc/localtime", "\x00"])
def test_an_unknown_time_zone_is_said(zone):
    seen = use(builtin.now(), timezone=zone)
    assert seen.problem == "error"
    assert seen.text.startswith("unknown time zone")


def test_the_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(monitor, "_nvml", lambda: None)
    first, *rest = use(builtin.gpu_monitor()).text.splitlines()
    assert first == "no GPU"
    assert re.fullmatch(r"RAM: \d+ of \d+ MB used, \d+ MB free", rest[0])
    assert re.fullmatch(r"swap: \d+ MB used", rest[1])


def test_the_machine_with_gpus(monkeypatch):
    cards = [monitor.Gpu("Card A", 6144, 1024, 5120, 37, 61, 45.5), monitor.Gpu("Card B", 6144, 1024, 5120)]
    monkeypatch.setattr(monitor, "gpus", lambda: [*cards, monitor.Gpu("Card C")])
    lines = use(builtin.gpu_monitor()).text.splitlines()
    assert lines[:3] == [
        "GPU 0 (Card A): 1024 of 6144 MB used, 5120 MB free, 37 % busy, 61 °C, 46 W",
        "GPU 1 (Card B): 1024 of 6144 MB used, 5120 MB free",
        "GPU 2 (Card C): the driver reports nothing",
    ]


def test_memory_is_searched_and_the_ids_are_known(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        told = datetime.datetime(2024, 5, 6, 12).timestamp()
        memory_id = memory.remember("The report is due\non Friday.", created_at=told, session_id="s1")
        found = []
        search = builtin.memory_search(memory, on_recalled=found.append)
        assert use(search, query="when is the report due?", k=1.0).text == (
            f"[{memory_id}] 2024-05-06: The report is due on Friday."
        )
        assert found == [[memory_id]]
        assert use(search, query="report", k=-3).ok
        elsewhere = builtin.memory_search(memory, "s2")
        assert use(elsewhere, query="report").text == "nothing remembered matches"
        empty = use(search, query=" ")
        assert (empty.problem, empty.text[:12]) == ("error", "the query is")


def test_the_agent_remembers_under_its_own_name(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        text = use(builtin.remember(memory, "s1"), text="Aiko prefers tea.").text
        memory_id = re.fullmatch(r"remembered as \[(.+)\]", text)[1]
        item = memory.get(memory_id)
        assert (item.content, item.source, item.session_id) == ("Aiko prefers tea.", "agent", "s1")


def test_python_runs_in_the_sandbox():
    made = builtin.python()
    assert made.isolated
    seen = use(made, code="print('a')\nsum(range(10))")
    assert (seen.text, seen.problem) == ("a\n45", None)
    assert use(made, code="1 / 0").problem == "error"
    began = time.monotonic()
    late = execute(made, {"code": "while True: pass"}, timeout_s=0.5)
    assert late.problem == "timeout"
    assert late.text == "timed out after 0.5 s; the process was killed"
    stopped = execute(
        made, {"code": "while True: pass"}, timeout_s=5, should_stop=lambda: time.monotonic() - began > 1.0
    )
    assert stopped.problem == "cancelled"


def test_every_tool_is_shown_in_one_line(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        tools = [
            builtin.calculator(), builtin.now(), builtin.gpu_monitor(), builtin.memory_search(memory),
            builtin.remember(memory), builtin.python(),
        ]  # fmt: skip
        for made in tools:
            assert check_tool(made.definition) is None
            assert made.description
            assert "\n" not in signature(made.definition)
        assert [made.name for made in tools] == [
            "calculator", "now", "gpu_monitor", "memory_search", "remember", "python",
        ]  # fmt: skip


# -- where the sandbox cannot be closed, on any kernel


def test_without_landlock_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "unavailable", lambda: "running Python needs Landlock")
    assert run_python("print(1)") == ("running Python needs Landlock", "error")


def test_the_platform_is_named_where_it_cannot_work(monkeypatch):
    sandbox.unavailable.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "this is darwin" in sandbox.unavailable()
    sandbox.unavailable.cache_clear()
