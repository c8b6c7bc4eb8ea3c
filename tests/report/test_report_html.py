"""The HTML report: self-contained, harmless whatever a model answered, and drawn without an error in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentlab.evolution.run import Run
from agentlab.report import html, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--enable-logging=stderr", "--v=0",
]  # fmt: skip
PROMPTS = {"test": {str(i): f"prompt {i} </pre><script>bad()</script>" for i in range(200)}}


class Page(HTMLParser):
    """Collects tags with their attributes, the text outside of scripts and styles, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._raw = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.text += data


@pytest.fixture
def report(full_run: Run, tmp_path: Path) -> Path:
    return write_report(full_run, tmp_path / "report.html", PROMPTS, {"test": {"199": "the expected one"}})


def test_report_is_one_small_file_that_fetches_nothing(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert report.stat().st_size < 10e6
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), (tag, attributes)
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:", style)
    assert sum("plotly.js" in script[:300] for script in page.scripts) == 1
    # 8 kinds of figures: three of the whole run, three for each of three generations
    assert sum(attributes.get("class") == "figure" for _, attributes in page.tags) == 3 + 3 * 3


def test_report_shows_the_numbers_of_the_records(report: Path, full_run: Run) -> None:
    shown = Page(report.read_text(encoding="utf-8")).text
    for number in ("2.0 %", "93.5 %", "+91.5 points", "89.2–96.2", "1.62 s", "4 min 48 s", "once"):
        assert number in shown
    for candidate in full_run.candidates():
        assert candidate.genome.candidate in shown
        if candidate.score:
            assert f"{candidate.score.fitness:.3f}" in shown
    assert "Both are wrong: 13 items" in shown
    assert "Gained: the base was wrong, the champion is right: 183 items" in shown
    assert "the expected one" in shown
    assert "prompt 187" in shown
    assert "12,000 more characters" in shown
    assert "東京の天気" in shown
    assert "seed: 7" in shown


def test_what_models_say_stays_text(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    page = Page(text)
    assert 'document.title="pwned"' in page.text
    assert not any("pwned" in script or "bad()" in script for script in page.scripts[-2:])
    assert not any(tag in ("img", "b") and "onerror" in attributes for tag, attributes in page.tags)
    assert "\x1b" not in text
    # the failed candidate's reason holds a tag; in the figures' JSON it must not close anything
    for script in page.scripts[:-2]:
        assert "<" not in script
    assert "script-src 'sha256-" in text
    assert "unsafe-inline" not in re.findall(r"script-src[^;]*", text)[0]


@pytest.mark.parametrize("state", ["base_run", "half_run", "failed_run", "base_champion_run"])
def test_report_can_be_written_in_every_state(state: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run: Run = request.getfixturevalue(state)
    path = write_report(run, tmp_path)
    assert path == tmp_path / "report.html"
    shown = Page(path.read_text(encoding="utf-8")).text
    expected = {
        "base_run": "Not finished", "half_run": "in generation 0: 1 evaluated, 1 trained, 3 bred",
        "failed_run": "no candidate passed the gate", "base_champion_run": "No candidate passed the gate",
    }  # fmt: skip
    assert expected[state] in shown


def test_before_the_seal_the_gates_answers_are_shown(full_run: Run) -> None:
    (full_run.folder / "sealed.json").unlink()
    shown = Page(html.render(full_run)).text
    assert "From the gate items (the sealed test has not been answered)" in shown
    assert "Both are wrong: 7 items" in shown


def test_long_runs_show_their_last_generations(full_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "LATEST", 2)
    shown = Page(html.render(full_run)).text
    assert "The last 2 of 3 generations." in shown
    assert "Scores in generation 0" not in shown


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed; apt-get install chromium lets this run")
def test_report_draws_in_a_browser_without_network_or_error(report: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", report.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert done.stdout.count('class="main-svg"') >= 12
    assert "<title>demo/1a2b3c4d · agentlab</title>" in done.stdout  # the hostile answer would have renamed the page
    assert 'data-title="Share chart' not in done.stdout
