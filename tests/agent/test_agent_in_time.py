"""On time, whatever hangs: deadlines, cancelling, abandoned loops, two answers at once, async."""

import asyncio
import contextlib
import re
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import Scripted, agent_of, call, chain_of, kinds
from memory.helpers import open_memory

from agentlab import models
from agentlab.agent import tool
from agentlab.agent.budget import Speed
from agentlab.errors import AgentError
from agentlab.inference.chain import Chain, Link
from agentlab.inference.transformers_engine import TransformersEngine

LONG = "one two three four five six seven eight nine ten " * 20


def timed(function):
    started = time.monotonic()
    return function(), time.monotonic() - started


def test_the_best_so_far_comes_back_at_the_deadline():

    agent = agent_of(engine=Scripted(LONG, token_s=0.02))
    result, seconds = timed(lambda: agent.ask("Count.", deadline_s=0.6))
    assert result.state == "deadline"
    assert seconds < 2.5
    assert result.final_answer.startswith("one two three")
    assert LONG.startswith(result.final_answer)
    assert result.confidence_score == 0


def test_token_budgets_follow_the_measured_speed():
    engine = Scripted(LONG, token_s=0.02)
    agent = agent_of(engine=engine, max_new_tokens=200)
    agent.speeds["model-primary"] = Speed(1000, 40)
    agent.ask("Count.", deadline_s=0.5)
    assert 5 < engine.requests[0].max_new_tokens < 20
    agent.ask("Count.")
    assert engine.requests[1].max_new_tokens == 200


def test_without_time_for_a_call_the_model_has_to_answer():
    @tool
    def slow_tool(x: int) -> str:
        """Slow."""
        return "done"

    engine = Scripted("Just this.")
    agent = agent_of(engine=engine, tools=[slow_tool])
    agent.speeds["model-primary"] = Speed(1000, 50)  # a call takes a second, an answer another half
    agent.ask("Do it.", deadline_s=1.2)
    assert engine.requests[0].structure["format"]["type"] == "any_text"
    agent.ask("Do it.", deadline_s=60)
    assert engine.requests[1].structure["format"]["type"] == "triggered_tags"


def test_a_model_that_hangs_in_its_prompt_does_not_break_the_deadline():
    agent = agent_of(engine=Scripted("late", prefill_s=3))
    result, seconds = timed(lambda: agent.ask("Hm?", deadline_s=0.4))
    assert (result.state, result.final_answer) == ("deadline", "")
    assert seconds < 2.5
    result, seconds = timed(lambda: agent.ask("Hm?", deadline_s=0.3))  # the first one is still at it
    assert result.state == "deadline"
    assert seconds < 2.5
    assert agent.ask("Hm?").final_answer == "late"


@pytest.mark.parametrize("tool_choice", ["auto", "none"])
def test_a_real_models_cut_off_words_are_no_whole_answer(tiny_model, tool_choice):
    """Its words are written under a grammar, which may end anywhere; the model itself never ends."""
    from agentlab.serve.replies import finish_reason

    with Chain([Link("primary", "tiny", lambda: TransformersEngine(models.resolve(str(tiny_model))))]) as chain:
        agent = agent_of(chain=chain, tools=[hang], max_new_tokens=40, tool_choice=tool_choice)
        cut = agent.ask("Tell me a story.")
        assert (cut.state, cut.cut_short, cut.confidence_score) == ("answered", True, 0)
        agent.speeds["tiny"] = Speed(1e6, 4)  # by which time leaves room for fewer tokens than are allowed
        late = agent.ask("Tell me a story.", deadline_s=6)
        assert (late.state, late.confidence_score) == ("deadline", 0)
        assert 4 <= late.completion_tokens < 40
        assert finish_reason(cut) == finish_reason(late) == "length"


def hang() -> str:
    """Never returns."""
    time.sleep(60)
    return ""


def shout() -> str:
    """Prints and returns ten megabytes."""
    print("y" * 10_000_000)
    return "z" * 10_000_000


def test_a_tool_that_hangs_ends_at_the_deadline_with_what_there_is():
    agent = agent_of(engine=Scripted(call("hang"), "It hung."), tools=[hang])
    result, seconds = timed(lambda: agent.ask("Hang.", deadline_s=0.8))
    assert result.state == "deadline"
    assert seconds < 3
    impatient = tool(hang, timeout_s=0.2)
    result, seconds = timed(lambda: agent_of(call("hang"), "It hung.", tools=[impatient]).ask("Hang.", deadline_s=5))
    assert result.final_answer == "It hung."
    assert "0.2" in result.reasoning_steps[0].observation
    assert seconds < 2.5


def backtrack() -> str:
    """A runaway regular expression: C code that holds the interpreter's lock for many seconds."""
    return str(re.match(r"(a+)+$", "a" * 28 + "b"))


def test_an_isolated_tool_that_holds_the_interpreters_lock_ends_at_the_deadline():
    agent = agent_of(engine=Scripted(call("backtrack"), "It hung."), tools=[tool(backtrack, isolated=True)])
    result, seconds = timed(lambda: agent.ask("Match.", deadline_s=1.0))
    assert result.state == "deadline"
    assert seconds < 2.5
    impatient = tool(backtrack, isolated=True, timeout_s=0.5)
    result = agent_of(call("backtrack"), "It hung.", tools=[impatient]).ask("Match.")
    assert result.final_answer == "It hung."
    assert "the process was killed" in result.reasoning_steps[0].observation


def test_ten_megabytes_are_cut_and_said_so(capsys):
    engine = Scripted(call("shout"), "Loud.")
    steps = list(agent_of(engine=engine, tools=[shout]).run("Shout.", deadline_s=10))
    seen = next(step for step in steps if step.kind == "observed")
    assert seen.truncated
    assert len(seen.text) < 5_000
    assert steps[-1].result.state == "answered"
    assert len(capsys.readouterr().out) < 1000


def test_cancelling_while_writing_and_while_a_tool_runs():
    agent = agent_of(engine=Scripted(LONG, token_s=0.02))
    threading.Timer(0.2, agent.cancel).start()
    result, seconds = timed(lambda: agent.ask("Count."))
    assert result.state == "cancelled"
    assert result.final_answer.startswith("one")
    assert seconds < 3
    agent = agent_of(engine=Scripted(call("hang"), "x"), tools=[tool(hang, timeout_s=30)])
    threading.Timer(0.2, agent.cancel).start()
    result, seconds = timed(lambda: agent.ask("Hang."))
    assert result.state == "cancelled"
    assert seconds < 5


@pytest.mark.parametrize("after", ["generated", "tool_called", "observed", "delta"])
def test_cancel_works_at_every_step(after):
    @tool
    def ping() -> str:
        """Pong."""
        return "pong"

    agent = agent_of(engine=Scripted(call("ping"), LONG, token_s=0.01), tools=[ping])
    last = None
    for step in agent.run("Ping."):
        last = step
        if step.kind == after:
            agent.cancel()
    assert last.result.state == "cancelled"
    assert agent.ask("Ping.", deadline_s=30).state == "answered"  # and the next answer is a whole one


def test_somebody_elses_wish_to_cancel_is_read_and_left_alone():
    wish = threading.Event()
    agent = agent_of(engine=Scripted(LONG, token_s=0.02))
    assert list(agent_of("ok").run("Hm?", cancel=wish))[-1].result.state == "answered"
    assert not wish.is_set()
    threading.Timer(0.2, wish.set).start()
    assert list(agent.run("Count.", cancel=wish))[-1].result.state == "cancelled"


def test_walking_away_ends_the_work():
    engine = Scripted(LONG, token_s=0.02)
    agent = agent_of(engine=engine)
    for step in agent.run("Count."):
        if step.kind == "delta":
            break
    _, seconds = timed(agent.close)
    assert seconds < 3
    assert engine.closed


def test_two_answers_at_once_wait_for_each_other():
    engine = Scripted("ok ok ok ok", token_s=0.05)
    agent = agent_of(engine=engine)
    results = []
    threads = [threading.Thread(target=lambda: results.append(agent.ask("Hm?"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.final_answer for result in results] == ["ok ok ok ok"] * 3


def test_async_runs_beside_other_work():
    agent = agent_of(engine=Scripted(LONG[:80], token_s=0.02))
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.01)

    async def main():
        ticking = asyncio.create_task(tick())
        result = await agent.aask("Count.")
        seen = kinds([step async for step in agent.arun("Count.")])
        ticking.cancel()
        return result, seen

    result, seen = asyncio.run(main())
    assert result.state == "answered"
    assert seen == ["generated", "answered"]
    assert len(ticks) > 20


def test_cancelling_the_coroutine_ends_the_work():
    engine = Scripted(LONG, token_s=0.02)
    agent = agent_of(engine=engine)

    async def main():
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(agent.aask("Count."), 0.3)

    asyncio.run(main())
    _, seconds = timed(agent.close)
    assert seconds < 5


def test_waiting_coroutines_take_none_of_the_event_loops_threads():
    """The loop's default executor has few threads, and whatever else waits for one must get it."""
    agent = agent_of(engine=Scripted(LONG, token_s=0.02))

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        waiting = [asyncio.create_task(agent.aask("Count.")) for _ in range(3)]
        await asyncio.sleep(0.1)
        await asyncio.wait_for(asyncio.to_thread(time.monotonic), 0.5)
        started = time.monotonic()
        late = await agent.aask("Count.", deadline_s=0.5)
        seconds = time.monotonic() - started
        agent.cancel()
        return [late, *await asyncio.gather(*waiting)], seconds

    results, seconds = asyncio.run(main())
    assert [result.state for result in results] == ["deadline", "cancelled", "cancelled", "cancelled"]
    assert seconds < 1.5


@pytest.mark.parametrize("closing", [True, False])
def test_leaving_the_asynchronous_loop_ends_the_work(closing):
    agent = agent_of(engine=Scripted(LONG, token_s=0.02))

    async def main():
        steps = agent.arun("Count.")
        async for _ in steps:
            break
        if closing:
            await steps.aclose()
        else:
            del steps

    asyncio.run(main())
    assert agent.chain.lock.acquire(timeout=2)
    agent.chain.lock.release()


def test_an_answer_that_waited_while_the_models_changed_is_given_by_the_new_ones():
    agent, other = agent_of("old"), agent_of("new", single_call=True)
    agent.load()
    old, close, results = agent.chain, agent.chain.close, []
    waiting = threading.Thread(target=lambda: results.append(agent.ask("Who are you?")))

    def close_later():
        waiting.start()
        time.sleep(0.2)  # it waits for the models that are closed meanwhile
        close()

    old.close = close_later
    agent.take_chain(other)
    waiting.join(5)
    assert [result.final_answer for result in results] == ["new"]
    assert old._models.engines == {}


def test_what_a_coroutine_asks_wrongly_is_raised_there():
    agent = agent_of("x")
    agent.close()
    with pytest.raises(AgentError, match="closed"):
        asyncio.run(agent.aask("Count."))


def test_an_answer_that_is_cancelled_before_its_first_step_is_cancelled():
    agent = agent_of("Hello.")
    steps = agent.run("Hi.")
    agent.cancel()
    assert list(steps)[-1].result.state == "cancelled"

    async def main():
        steps = agent.arun("Hi.")
        agent.cancel()
        return [step async for step in steps]

    assert asyncio.run(main())[-1].result.state == "cancelled"
    assert agent.ask("Hi.").state == "answered"


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "soon"])
def test_an_impossible_deadline_is_refused(deadline):
    with pytest.raises(AgentError, match="deadline_s"):
        agent_of("x").run("Hm?", deadline_s=deadline)


def test_no_time_left_after_a_tool_is_a_deadline_with_its_result():
    @tool
    def slow() -> str:
        """Slow."""
        time.sleep(0.6)
        return "the result"

    agent = agent_of(engine=Scripted(call("slow"), LONG), tools=[slow], max_steps=3)
    agent.speeds["model-primary"] = Speed(10_000, 400)

    def crawl(step):
        if step.kind == "tool_called":
            agent.speeds["model-primary"].decode_tokens_per_s = 2

    result = agent.ask("Do it.", deadline_s=1.2, on_step=crawl)
    assert (result.state, result.final_answer) == ("deadline", "the result")


def price() -> str:
    """What it costs."""
    return "397.8 dollars"


def test_a_fragment_does_not_replace_a_finished_result():
    agent = agent_of(engine=Scripted(call("price"), LONG, token_s=0.02), tools=[price])
    result = agent.ask("What does it cost?", deadline_s=1.5)
    assert (result.state, result.final_answer) == ("deadline", "397.8 dollars")
    assert result.completion_tokens > 20  # it was writing
    spoken = agent_of(engine=Scripted(call("price"), "It costs 397.8 dollars."), tools=[price])
    assert spoken.ask("What does it cost?", deadline_s=20).final_answer == "It costs 397.8 dollars."


def test_a_result_outlives_the_model_that_asked_for_it():
    primary, fallback = Scripted(call("price"), "", ""), Scripted(LONG, token_s=0.02)
    agent = agent_of(chain=chain_of(primary, fallback), tools=[price])
    result = agent.ask("What does it cost?", deadline_s=1.5)
    assert (result.state, result.final_answer) == ("deadline", "397.8 dollars")


def test_what_the_deadline_cut_off_is_a_turn_and_no_memory(tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        agent = agent_of(engine=Scripted(LONG, token_s=0.02), memory=memory)
        result = agent.ask("My cat is called Miezi.", deadline_s=1.5, session_id="s1")
        agent.close()  # what is remembered after the deadline is remembered
        assert result.final_answer.startswith("one two")
        assert [item.content for item in memory.items()] == ["My cat is called Miezi."]
        (turn,) = memory.conversation("s1").turns()
        assert (turn.agent_response, turn.metadata["state"]) == (result.final_answer, "deadline")
        memory.conversation("s1").undo()
        assert len(memory) == 0


@contextlib.contextmanager
def locked(path):
    """Another process writes into the memory at `path` and does not come to an end."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        db.execute("COMMIT")
        db.close()


def test_a_memory_that_is_locked_costs_its_share_of_the_time_and_never_the_answer(tmp_path):
    path = tmp_path / "memory.db"
    with open_memory(path) as memory:
        engine = Scripted("Miezi.")
        agent = agent_of(engine=engine, memory=memory)
        agent.ask("My cat is called Miezi.", session_id="s1")
        with locked(path):
            result, seconds = timed(lambda: agent.ask("What is my cat called?", session_id="s2", deadline_s=6.0))
            assert (result.state, result.final_answer) == ("answered", "Miezi.")
            assert seconds < 3.0  # one for the turn that cannot be stored; reading needs no lock
            assert ["not stored yet" in said for said in result.warnings] == [True]
            assert "My cat is called Miezi." in str(engine.requests[-1].messages)
            result, seconds = timed(lambda: agent.ask("And my dog?", deadline_s=3.0))
            assert (result.state, result.final_answer) == ("answered", "Miezi.")
            assert seconds < 3.0
            assert "did not answer in time" in result.warnings[0]  # the turn before it is part of the talk
        agent.close()  # what is remembered later is remembered
        assert [turn.user_input for turn in memory.conversation("s2").turns()] == ["What is my cat called?"]


def test_loading_passes_over_a_model_that_breaks_at_it():
    agent = agent_of(chain=chain_of(Scripted(RuntimeError("CUDA error")), Scripted("ok")))
    assert agent.load().role == "fallback"


class BusyWhileLoading(Scripted):
    """Its machine is busy for the first generations, and then is not."""

    busy = 1

    def stream(self, request, should_stop=lambda: False):
        self.busy, busy = max(0, self.busy - 1), self.busy > 0
        self.prefill_s, self.token_s = (0.6, 0.1) if busy else (0.0, 0.002)
        return super().stream(request, should_stop)


def test_a_moment_in_which_the_machine_was_busy_keeps_no_later_answer_from_being_begun():
    engine = BusyWhileLoading("The answer is 5, of course.")
    agent = agent_of(engine=engine)
    agent.load()
    question = "What is 2 + 3? " + "Some more words of a question. " * 60
    assert agent.speeds["model-primary"].seconds(engine.count_tokens([{"content": question}]), 8) > 2
    first = agent.ask(question, deadline_s=2)
    assert (first.state, first.final_answer) == ("answered", "The answer is 5, of course.")


def test_a_machine_that_is_too_slow_is_measured_anew_now_and_then_and_not_for_every_answer():
    engine = BusyWhileLoading("The answer is 5, of course.")
    engine.busy = 100
    agent = agent_of(engine=engine)
    agent.load()
    question = "What is 2 + 3? " + "Some more words of a question. " * 400
    for _ in range(3):
        result, seconds = timed(lambda: agent.ask(question, deadline_s=2))
        assert (result.state, result.final_answer) == ("deadline", "")
        assert seconds < 2.5
    assert len(engine.requests) == 2  # while it was loaded, and once since
