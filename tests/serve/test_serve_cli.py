"""`agentlab serve` as a command: what it says, refuses and frees."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys

import pytest
from click.testing import CliRunner
from nvml_standin import Nvml

from agentlab.cli.main import main
from agentlab.serve.access import token_file
from agentlab.serve.server import _example, token_words


@pytest.fixture
def environment(tmp_path):
    home = tmp_path / "home"
    kept = {name: value for name, value in os.environ.items() if name != "AGENTLAB_TOKEN"}
    return {**kept, "AGENTLAB_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def start(own, environment, *options):
    """The process, and what it said up to its example."""
    sets = [word for override in own.overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "agentlab", "serve", own.experiment.name, *sets, "--port", "0", "--no-memory"]
    process = subprocess.Popen(
        [*command, *options], cwd=own.experiment.parent, stderr=subprocess.PIPE, text=True, env=environment
    )
    said = ""
    while "curl " not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process, said


def test_the_printed_line_works_and_sigterm_ends_it_cleanly(own, environment, tmp_path):
    process, said = start(own, environment)
    champion = own.run.champion()
    assert re.search(rf"serving .* \+ {champion} of {own.run.id} on http://127.0.0.1:\d+/v1", said)
    curl = next(line for line in said.splitlines() if line.startswith("curl "))
    done = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["agentlab"]["adapter"] == champion
    token = tmp_path / "home" / "serve-token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text().strip() in curl
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()


def test_the_shown_words_read_the_token_from_its_file(tmp_path):
    path = tmp_path / "a home" / "serve-token"
    token, _ = token_file(path)
    line = _example("127.0.0.1:8400", token_words(path))
    assert token not in line
    done = subprocess.run(line.replace("curl ", "printf '%s\n' "), shell=True, capture_output=True, text=True)
    assert f"Authorization: Bearer {token}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "environment_token", "shown"),
    [
        ((), "x" * 20, "$AGENTLAB_TOKEN"),
        (("--token", "y" * 20), None, "<token>"),
        (("--token", "y" * 20), "x" * 20, "<token>"),
        (("--no-token",), None, ""),
    ],
)
def test_the_shown_words_are_those_that_a_shell_knows(own, environment, monkeypatch, options, environment_token, shown):
    found = []
    monkeypatch.setattr("agentlab.serve.server.serve", lambda *_, token_shown, **__: found.append(token_shown))
    sets = [word for override in own.overrides for word in ("--set", override)]
    env = {"AGENTLAB_HOME": environment["AGENTLAB_HOME"], "AGENTLAB_TOKEN": environment_token}
    result = CliRunner().invoke(main, ["serve", str(own.experiment), *sets, *options], env=env)
    assert result.exit_code == 0, result.output
    assert found == [shown]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--no-token", "--host", "0.0.0.0"), 13, "open to everybody"),
        (("--no-token", "--cors", "*"), 13, "every web page"),
        (("--no-token", "--token", "x" * 20), 2, "exclude each other"),
        (("--token", "short"), 13, "16 or more visible ASCII characters"),
        (("--cors", "localhost"), 13, "--cors localhost"),
        (("--host", "192.0.2.1"), 13, "this machine has no such address"),
        (("--adapter", "g009-c09"), 4, "allowed for tiny/"),
        (("--queue", "0"), 2, "queue"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(own, environment, monkeypatch, options, code, message):
    monkeypatch.setenv("AGENTLAB_HOME", environment["AGENTLAB_HOME"])
    sets = [word for override in own.overrides for word in ("--set", override)]
    result = CliRunner().invoke(main, ["serve", str(own.experiment), *sets, "--port", "0", *options])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "two models do not fit"), ("cpu", "this machine has no such address")]
)
def test_to_share_is_refused_only_where_torch_runs_on_a_card(own, environment, monkeypatch, device, message):
    monkeypatch.setenv("AGENTLAB_HOME", environment["AGENTLAB_HOME"])
    monkeypatch.setattr("agentlab.hardware.monitor._nvml", Nvml)
    monkeypatch.setattr("agentlab.hardware.monitor.accelerator", lambda: device)
    result = CliRunner().invoke(main, ["serve", str(own.experiment), "--share", "--host", "192.0.2.1"])
    assert result.exit_code == 13, result.output
    assert message in result.output


def test_a_port_in_use_is_one_sentence_before_anything_is_loaded(own, environment, monkeypatch):
    monkeypatch.setenv("AGENTLAB_HOME", environment["AGENTLAB_HOME"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", str(own.experiment), "--port", str(port)])
    assert result.exit_code == 13
    assert f"cannot serve on 127.0.0.1:{port}: the port is in use; choose another one with --port" in result.output


def test_the_dashboard_is_printed_without_a_model():
    code = (
        "import sys; from click.testing import CliRunner; from agentlab.cli.main import main; "
        "print(CliRunner().invoke(main, ['serve', '--grafana']).stdout); "
        "print([name for name in ('torch', 'transformers', 'mlflow', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    board, _, heavy = done.stdout.strip().rpartition("\n")
    assert json.loads(board)["title"] == "agentlab serve"
    assert heavy == "[]", done.stderr
