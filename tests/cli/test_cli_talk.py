"""`ask` and `chat` without a model: what is refused before one loads, a store that takes no trace, the typed lines."""

import contextlib
import json
import os
import signal
import time

import pytest
from agent.helpers import Scripted, agent_of, chain_of
from click.testing import CliRunner
from memory.helpers import open_memory

from agentlab.cli.lines import Lines, drop
from agentlab.cli.main import main
from agentlab.cli.talk import Talk
from agentlab.errors import ModelError, StorageError
from agentlab.memory.store import Store

readline = pytest.importorskip("readline")


class BrokenStore:
    """Stands in for the lab: an MLflow store that cannot be written."""

    def trace(self, steps):
        raise OSError("unable to open database file")


@pytest.fixture
def opened(monkeypatch):
    """How often `ask` and `chat` have loaded a model; a scripted one answers."""
    count = []

    @contextlib.contextmanager
    def fake(*chosen):
        count.append(chosen)
        yield BrokenStore(), agent_of("Fine.")

    monkeypatch.setattr("agentlab.cli.agent._opened", fake)
    return count


def run(*words):
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_is_not_lost_when_no_trace_can_be_written(opened, as_json):
    result = run("ask", "How are you?", "--trace", *(["--json"] if as_json else []))
    assert result.exit_code == 0
    assert "no trace was written: unable to open database file" in result.stderr
    assert (json.loads(result.stdout)["final_answer"] if as_json else result.stdout.strip()) == "Fine."


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([""], 11, "the task is empty"),
        (["Hm?", "--session", "s1", "--no-memory"], 2, "allowed: one of them"),
        (["Hm?", "--session", " "], 9, "--session is empty"),
        (["Hm?", "--deadline", "1e7"], 2, "'1e7'; allowed: seconds above 0"),
        (["Hm?", "--deadline", "nan"], 2, "'nan'; allowed: seconds above 0"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_model_loads(opened, words, code, message):
    result = run("ask", *words)
    assert (result.exit_code, opened) == (code, [])
    assert message in result.output


def test_a_thought_that_was_shown_as_the_answer_is_parted_from_it(monkeypatch):
    @contextlib.contextmanager
    def fake(*chosen):
        yield None, agent_of("Two and two, hm.</think>The answer is 4.")

    monkeypatch.setattr("agentlab.cli.agent._opened", fake)
    result = run("ask", "2 + 2?")
    assert result.stdout.splitlines()[-1] == "The answer is 4."
    assert result.stdout.count("The answer is 4.") == 1
    assert "that was a thought" in result.stderr


@pytest.mark.parametrize(("logprob", "told"), [(0.0, "confidence 100%"), (None, "confidence unknown")])
def test_the_confidence_is_told_or_said_to_be_unknown(monkeypatch, logprob, told):
    @contextlib.contextmanager
    def fake(*chosen):
        yield None, agent_of(engine=Scripted("Fine.", logprob=logprob))

    monkeypatch.setattr("agentlab.cli.agent._opened", fake)
    assert told in run("ask", "How are you?", "--steps").stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_that_ctrl_c_ended_says_so_in_its_exit_code(monkeypatch, as_json):
    def stop(request):
        os.kill(os.getpid(), signal.SIGINT)
        return "Not said any more. " * 50

    @contextlib.contextmanager
    def fake(*chosen):
        yield None, agent_of(engine=Scripted(stop, token_s=0.02))

    monkeypatch.setattr("agentlab.cli.agent._opened", fake)
    result = run("ask", "How are you?", *(["--json"] if as_json else []))
    assert result.exit_code == 8
    assert json.loads(result.stdout)["state"] == "cancelled" if as_json else "(cancelled)" in result.stderr


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Type lines, or what functions return, into a talk; the text of the file that keeps typed lines, None without."""
    monkeypatch.setenv("AGENTLAB_HOME", str(tmp_path / "home"))

    def typed(*lines, memory=None, engine=None):
        left = iter(lines)

        def read(prompt):
            with contextlib.suppress(StopIteration):
                line = next(left)
                line = line() if callable(line) else line
                readline.add_history(line)  # as `input` does at a terminal
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)
        readline.clear_history()  # another process begins without any
        agent = agent_of("Fine.", memory=memory, engine=engine)
        Talk(None, agent, "s1" if memory is not None else None, None, False).run()
        path = tmp_path / "home" / "chat-history"
        return path.read_text(errors="replace") if path.exists() else None

    yield typed
    readline.clear_history()


def test_typed_lines_are_kept_for_the_next_talk(talk, tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        assert "Hello" in talk("Hello", memory=memory)
        kept = talk("And now?", memory=memory)
        assert "Hello" in kept
        assert "And now?" in kept


def test_a_session_that_cannot_be_leaves_the_talk_where_it_is(talk, tmp_path, capsys):
    with open_memory(tmp_path / "memory.db") as memory:
        talk("Hello", "/session \udcff", "And now?", "/session", memory=memory)
        shown = capsys.readouterr()
        assert "s1  (this one)" in shown.out
        assert len(memory.conversation("s1").turns()) == 2


def test_without_a_memory_no_typed_line_is_kept(talk):
    assert talk("The code is zebra4711.") is None


def shown(engine, number=-1):
    """What the model was shown of the talk in one of its requests."""
    return [message["content"] for message in engine.requests[number].messages if message["role"] != "system"]


def test_without_a_memory_the_talk_is_known_for_as_long_as_it_lasts(talk, tmp_path, capsys):
    engine = Scripted("Hello Aiko.")
    talk("I am Aiko.", "Who am I?", "/history", "/undo", "Really?", "/undo", "/undo", "/undo", engine=engine)
    assert shown(engine) == ["I am Aiko.", "Hello Aiko.", "Really?"]  # without what was taken back
    assert shown(engine, -2) == ["I am Aiko.", "Hello Aiko.", "Who am I?"]
    output = capsys.readouterr().out
    assert "> I am Aiko.\nHello Aiko.\n> Who am I?\nHello Aiko.\n" in output
    assert "taken back: Who am I?" in output
    assert "nothing to take back" in output
    assert not (tmp_path / "home").exists()  # nothing of it was written
    fresh = Scripted("Fine.")
    talk("Who am I?", engine=fresh)
    assert shown(fresh) == ["Who am I?"]


def test_what_failed_is_no_turn_of_a_talk_without_a_memory(talk):
    engine = Scripted("", "", "Yes.")
    talk("Hm?", "Well?", engine=engine)
    assert shown(engine) == ["Well?"]


def test_forgetting_and_taking_back_drop_the_typed_lines(talk, tmp_path):
    with open_memory(tmp_path / "memory.db") as memory:
        assert "zebra4711" in talk("The code is zebra4711.", memory=memory)
        (told,) = [item.memory_id for item in memory.items() if "zebra4711" in item.content]
        kept = talk("Hello", f"/forget {told}", "Good day", memory=memory)
        assert "zebra4711" not in kept
        assert "Hello" not in kept
        assert "Good day" in kept
        kept = talk("The code is tiger0815.", "/forget m-unknown", "/undo", "/history", memory=memory)
        assert "tiger0815" not in kept
        assert "/history" in kept


def forget(*words):
    return run("memory", "forget", *words)


def id_of(path, word):
    with open_memory(path) as memory:
        return next(item.memory_id for item in memory.items() if word in item.content)


@pytest.mark.parametrize("session", [False, True])
def test_the_command_that_forgets_drops_the_typed_lines_too(talk, tmp_path, session):
    path = tmp_path / "memory.db"
    with open_memory(path) as memory:
        assert "zebra4711" in talk("The code is zebra4711.", memory=memory)
    words = ["--session", "s1"] if session else [id_of(path, "zebra4711")]
    assert forget("m-unknown", "--file", str(path)).exit_code == 9
    assert (tmp_path / "home" / "chat-history").exists()
    result = forget(*words, "--file", str(path))
    assert result.exit_code == 0
    assert not (tmp_path / "home" / "chat-history").exists()
    for place in ("typed lines of chats are dropped", "not reached: exports", "MLflow", "adapters"):
        assert place in result.stderr


def test_typed_lines_are_dropped_also_where_the_file_cannot_be_rewritten(talk, tmp_path, monkeypatch):
    """It is forgotten by then; only traces stay, until the disk has room."""
    path = tmp_path / "memory.db"
    with open_memory(path) as memory:
        talk("The code is zebra4711.", memory=memory)

    def full(store):
        raise StorageError("no space left")

    memory_id = id_of(path, "zebra4711")
    monkeypatch.setattr(Store, "purge", full)
    result = forget(memory_id, "--file", str(path))
    assert result.exit_code == 7
    assert "forgotten, but traces stay" in result.stderr
    assert not (tmp_path / "home" / "chat-history").exists()


def test_taking_back_drops_the_typed_lines_also_where_the_file_cannot_be_rewritten(talk, tmp_path, monkeypatch):
    def full(store):
        raise StorageError("no space left")

    with open_memory(tmp_path / "memory.db") as memory:
        talk("The code is zebra4711.", memory=memory)
        monkeypatch.setattr(Store, "purge", full)
        assert "zebra4711" not in (talk("/undo", memory=memory) or "")
        assert not memory.conversation("s1").turns()


def test_a_forgetting_just_before_the_lines_are_written_leaves_none(tmp_path, monkeypatch):
    readline = pytest.importorskip("readline")
    path = tmp_path / "chat-history"
    write = readline.write_history_file

    def meanwhile(file):
        drop(path)
        write(file)

    with Lines(path):
        readline.add_history("The code is zebra4711.")
        monkeypatch.setattr(readline, "write_history_file", meanwhile)
    assert not path.exists()


def test_a_turn_that_is_still_being_stored_can_be_taken_back(talk, tmp_path, monkeypatch, capsys):
    with open_memory(tmp_path / "memory.db") as memory:
        remember = memory.remember

        def slowly(*values, **named):
            time.sleep(0.8)
            return remember(*values, **named)

        monkeypatch.setattr(memory, "remember", slowly)
        talk("/deadline 1", "The code is zebra4711.", "/undo", memory=memory)
        assert "taken back: The code is zebra4711." in capsys.readouterr().out
        assert memory.conversation("s1").turns() == []


def test_a_talk_that_is_open_while_others_forget_keeps_none_of_its_lines(talk, tmp_path):
    path = tmp_path / "memory.db"
    with open_memory(path) as memory:

        def elsewhere():
            assert forget(id_of(path, "zebra4711"), "--file", str(path)).exit_code == 0
            return "Hello"

        assert talk("The code is zebra4711.", elsewhere, memory=memory) is None
        assert "Good day" in talk("Good day", memory=memory)  # the next talk keeps them again


def test_chats_forget_says_what_it_does_not_reach(talk, tmp_path, capsys):
    with open_memory(tmp_path / "memory.db") as memory:
        memory.remember("The code is zebra4711.")
        talk(f"/forget {id_of(memory.path, 'zebra4711')}", memory=memory)
    assert "not reached: exports" in capsys.readouterr().err


def test_typed_lines_that_cannot_be_deleted_are_told_of(talk, tmp_path, monkeypatch, capsys):
    with open_memory(tmp_path / "memory.db") as memory:
        talk("Hello", memory=memory)

        def refuse(self, **_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.unlink", refuse)
        talk("The code is zebra4711.", "/undo", memory=memory)
        assert "the typed lines stay in" in capsys.readouterr().err


class OtherModels:
    """Stands in for the lab of a talk that asks for other models: `engine`, or the error that its loading raises."""

    def __init__(self, engine):
        self.engine = engine

    def agent(self, *_, **__):
        return agent_of(chain=chain_of(self.engine))


@pytest.mark.parametrize("failure", [ModelError("no memory left"), KeyboardInterrupt()])
def test_an_adapter_that_cannot_be_loaded_leaves_the_talk_with_the_old_one(failure, monkeypatch, capsys):
    lines = iter(["hello", "/adapter other", "hello again"])
    agent = agent_of(engine=Reopened("Fine.", "Still fine."))
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    Talk(OtherModels(failure), agent, None, None, False).run()
    said = capsys.readouterr()
    assert said.out.split("\n")[:2] == ["Fine.", "Still fine."]
    assert "no memory left" in said.err or "stopped" in said.err


def test_another_adapter_answers_from_then_on(monkeypatch, capsys):
    lines = iter(["hello", "/adapter other", "hello again"])
    agent = agent_of("Fine.")
    old = agent.chain
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    Talk(OtherModels(Scripted("Other.")), agent, None, None, False).run()
    assert capsys.readouterr().out.split("\n")[:2] == ["Fine.", "Other."]
    assert old._models.engines == {}


class Reopened(Scripted):
    """Can be opened again after it was closed."""

    def close(self):
        pass


@pytest.mark.parametrize("command", ["memory", "undo", "history"])
def test_ctrl_c_in_a_command_ends_the_command_and_not_the_talk(monkeypatch, capsys, command):
    lines = iter([f"/{command}", "hello"])
    talk = Talk(None, agent_of("Fine."), None, None, False)

    def interrupted(_):
        raise KeyboardInterrupt

    talk._commands[command] = interrupted
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    talk.run()
    assert "Fine." in capsys.readouterr().out


def test_a_line_that_is_no_utf_8_is_read_as_far_as_it_can_be(opened):
    result = CliRunner().invoke(main, ["chat", "--no-memory"], input=b"caf\xe9?\nand now?\n", catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.count("Fine.") == 2
