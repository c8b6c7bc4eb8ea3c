"""`agentlab ask` and `agentlab chat` on the tiny model: what they print, refuse, remember and take back."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from agentlab.cli.main import main
from agentlab.memory import Memory


@pytest.fixture
def project(tiny_experiment, monkeypatch):
    """A project with the tiny model and a memory of its own, never evolved; the working directory is in it."""
    text = tiny_experiment.read_text() + "memory: {path: memory.db}\n"
    tiny_experiment.write_text(text)
    monkeypatch.chdir(tiny_experiment.parent.parent)
    return tiny_experiment.parent.parent


def run(*words, stdin=None):
    return CliRunner().invoke(main, list(words), input=stdin, catch_exceptions=False)


def test_ask_says_who_answers_and_answers(project):
    result = run("ask", "Hello?", "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    assert "base model on cpu" in result.stderr
    assert result.stdout.strip()


def test_ask_as_json_has_every_field_and_nothing_else(project):
    result = run("ask", "Hello?", "--max-tokens", "8", "--json", "--no-memory")
    fields = json.loads(result.stdout)
    assert fields["state"] == "answered"
    assert fields["prompt"] == "Hello?"
    assert fields["model_info"]["model_sha256"]
    assert fields["memory_usage"]["cpu_total"] > 0
    assert not (project / "memory.db").exists()


def test_ask_remembers_with_a_session_only(project):
    run("ask", "Hello there?", "--max-tokens", "8")
    with Memory.open(project / "memory.db") as memory:
        assert len(memory) == 0
    run("ask", "My cat is called Miezi.", "--max-tokens", "8", "--session", "s1")
    with Memory.open(project / "memory.db") as memory:
        (turn,) = memory.conversation("s1").turns()
        assert turn.user_input == "My cat is called Miezi."
        assert turn.metadata["state"] == "answered"
        assert memory.recall("What is the cat called?")[0].source == "person"


def test_ask_shows_what_was_recalled(project):
    with Memory.open(project / "memory.db") as memory:
        memory.remember("The cat is called Miezi.", memory_type="knowledge")
    result = run("ask", "What is the cat called?", "--max-tokens", "8", "--steps")
    assert "recalled: - The cat is called Miezi." in result.stderr
    assert "1 memories" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("ask", "  "), 11, "the task is empty"),
        (("ask", "Hm?", "--adapter", "g009-c09"), 4, "allowed for tiny/"),
        (("ask", "Hm?", "--experiment", "nowhere.yaml"), 2, "no experiment at nowhere.yaml"),
        (("ask", "Hm?", "--set", "model.primary=nobody/nothing"), 3, "nobody/nothing"),
        (("ask", "Hm?", "--format", "native"), 11, "allowed: auto, tags, react"),
        (("ask", "Hm?", "--deadline", "0"), 2, "deadline"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(project, words, code, message):
    if "--set" in words:
        words = (*words, "--experiment", "experiments/tiny.yaml")
    result = run(*words)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_fallback_answers_where_the_primary_cannot_be_loaded(project, tiny_model, tmp_path):
    broken = tmp_path / "broken-model"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(b"not weights")
    result = run(
        "ask", "Hm?", "--experiment", "experiments/tiny.yaml", "--max-tokens", "8", "--json", "--no-memory",
        "--set", f"model.primary={broken}", "--set", f"model.fallback={tiny_model}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fields = json.loads(result.stdout)
    assert fields["model_info"]["role"] == "fallback"
    assert "cannot be loaded" in fields["fallbacks"][0]


def test_a_talk(project):
    script = "\n".join(
        ["Hello, I am Tomas.", "/steps on", "What is my name?", "/history", "/memory", "/remember Tea is better.",
         "/memory tea", "/undo", "/history", "/session", "/think on", "/deadline 30", "/adapter", "/adapter base",
         "/adapter nobody", "/wrong", "/think maybe", "/deadline soon", "/help", "/quit"]
    )  # fmt: skip
    result = run("chat", "--max-tokens", "6", "--session", "t1", stdin=script + "\n")
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    for expected in ("talk 't1', 0 turns so far", "taken back: What is my name?", "Tea is better.", "t1  (this one)",
                     "no command /wrong", "/think maybe; allowed: on, off", "answering now:"):  # fmt: skip
        assert expected in result.output, expected
    with Memory.open(project / "memory.db") as memory:
        assert [turn.user_input for turn in memory.conversation("t1").turns()] == ["Hello, I am Tomas."]
        assert "What is my name?" not in {item.content for item in memory.items()}
    again = run("chat", "--max-tokens", "6", "--session", "t1", stdin="")
    assert "talk 't1', 1 turns so far" in again.output


def test_a_trace_is_kept_when_it_is_wanted(project):
    result = run("ask", "Hello?", "--max-tokens", "6", "--trace", "--no-memory")
    assert result.exit_code == 0, result.output
    trace_id = result.stderr.split("trace ")[-1].split()[0]
    from agentlab.tracking import store

    client = store.configure(project)
    trace = client.get_trace(trace_id)
    kinds = {span.span_type: span for span in trace.data.spans}
    assert {"AGENT", "CHAT_MODEL"} <= set(kinds)
    assert kinds["AGENT"].inputs["task"] == "Hello?"
    assert kinds["AGENT"].start_time_ns <= kinds["CHAT_MODEL"].start_time_ns
    assert kinds["CHAT_MODEL"].end_time_ns <= kinds["AGENT"].end_time_ns


def test_outside_a_project_the_defaults_answer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c",
         "from agentlab.lab import Lab; lab = Lab.newest(); print(lab.run.id, lab.run.champion())"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "AGENTLAB_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.stdout.startswith("default/"), done.stderr
    assert done.stdout.strip().endswith("base")


def test_help_of_ask_and_chat_imports_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from agentlab.cli.main import main; "
        "CliRunner().invoke(main, ['ask', '--help']); "
        "print([name for name in ('torch', 'transformers', 'mlflow', 'faiss') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
