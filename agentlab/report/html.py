"""The report of a run: one HTML file that needs nothing else, no network and no server."""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from agentlab import config, files
from agentlab.evolution.run import Run
from agentlab.records import BASE
from agentlab.report import answers, figures, words
from agentlab.report.summary import cost_lines, headline, missing_lines, resource_lines, sealed_lines, timed
from agentlab.report.tree import family_tree

if TYPE_CHECKING:
    import plotly.graph_objects as go

Texts = Mapping[str, Mapping[str, str]]
LATEST = 12  # generations with figures of their own; a longer run shows its last ones
_DRAW = """
for (const place of document.querySelectorAll(".figure")) {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displaylogo: false, responsive: true,
    showSendToCloud: false, plotlyServerURL: "",
    displayModeBar: matchMedia("(max-width: 40rem)").matches ? false : "hover"});
}
window.addEventListener("beforeprint", () => {
  for (const place of document.querySelectorAll(".figure")) Plotly.Plots.resize(place);
  for (const more of document.querySelectorAll("details")) more.open = true;
});
"""


def write_report(run: Run, out: Path, prompts: Texts | None = None, expected: Texts | None = None) -> Path:
    """The path of the report, written to `out` (a file, or a folder for report.html in it).

    `prompts` and `expected` give, per split ("test", "gate"), the text of each item by its position ("0", "1", …) or
    by its id in the split's order. Works for a run in any state; what is missing is said. Raises StorageError.
    """
    path = out / "report.html" if out.is_dir() else out
    files.write_text(path, render(run, prompts, expected))
    return path


def render(run: Run, prompts: Texts | None = None, expected: Texts | None = None) -> str:
    """The report as HTML. Every text in it is escaped, and its own policy forbids scripts that are not its own."""
    from plotly.offline import get_plotlyjs

    library = get_plotlyjs().replace("</script", "<\\/script")
    sections = [
        ("result", "Sealed comparison", _sealed(run)),
        ("fitness", "Fitness by generation", _figure(figures.fitness_by_generation(run), _FITNESS)),
        ("lineage", "Lineage", _lineage(run)),
        ("tradeoff", "Accuracy, latency and memory", _figure(figures.tradeoff(run)) + _lines(resource_lines(run))),
        ("candidates", "Candidates", answers.candidates_html(run)),
        ("generations", "Generations: training, scores and gate", _generations(run)),
        ("answers", "Answers side by side", answers.answers_html(run, prompts or {}, expected or {})),
        ("settings", "Settings and cost", _settings(run)),
        ("reproduce", "How to reproduce", _reproduce(run)),
    ]
    links = " ".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "\n".join(f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>' for key, title, html in sections)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"script-src '{_digest(library)}' '{_digest(_DRAW)}'; base-uri 'none'; form-action 'none'"
    )
    style = resources.files("agentlab.report").joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.id)} · agentlab</title>
<style>{style}</style>
</head>
<body>
{_header(run)}
<nav>{links}</nav>
<noscript><p class="note">The figures need JavaScript; all numbers are in the tables as well.</p></noscript>
{body}
<script>{library}</script>
<script>{_DRAW}</script>
</body>
</html>
"""


_FITNESS = (
    "Each point is one candidate; the bar is the 95 % interval of its score on the fitness items. The best of many "
    "looks better than it is, because it was chosen by these numbers: the gate and the sealed test use other items."
)


def _header(run: Run) -> str:
    sealed, champion = run.sealed(), run.champion()
    tiles = []
    if sealed:
        tiles.append((words.percent(sealed.base.accuracy), "base model on the sealed test"))
        if sealed.champion != BASE:
            tiles.append((words.percent(sealed.champion_score.accuracy), f"champion {sealed.champion} on it"))
            low, high = 100 * sealed.gain_ci_low, 100 * sealed.gain_ci_high
            tiles.append((words.points(sealed.gain), f"gain, 95 % interval {low:+.1f} to {high:+.1f}"))
    score = timed(run, champion)
    who = "base model" if champion == BASE else f"champion {champion}"
    if score:
        target = run.settings.budget.latency_s
        p50 = score.latency_p50_s
        shown = words.seconds(score.latency_estimated_s if p50 is None else p50)
        kind = "estimated" if p50 is None else "p50"
        tiles.append((shown, f"latency of the {who} ({kind}; target {target:g} s)"))
        vram = score.vram_peak_mib
        memory = words.mebibytes(vram or score.ram_peak_mib)
        tiles.append((memory, f"peak {'VRAM' if vram else 'RAM (no GPU)'} of the {who}"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    )
    notes = "".join(f'<p class="note">{escape(line[0].upper() + line[1:])}.</p>' for line in missing_lines(run))
    verdict = headline(run)
    return (
        f'<header><p class="muted">agentlab · {escape(run.id)} · {escape(run.settings.model.primary)} on '
        f"{escape(run.settings.suite)}</p><h1>{escape(verdict[0].upper() + verdict[1:])}</h1>"
        f'{notes}<div class="tiles">{cells}</div></header>'
    )


def _sealed(run: Run) -> str:
    lines = sealed_lines(run)
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _lineage(run: Run) -> str:
    note = (
        "A line leads from each parent to its child; its width is the share of that parent in the merge (point at the "
        "line). Dotted lines lead from the base model to founders."
    )
    columns = 2 + max((c.genome.generation for c in run.candidates()), default=0)
    tree = f'<details><summary>As text</summary><pre class="tree">{escape(family_tree(run))}</pre></details>'
    return _figure(figures.lineage(run), note, min_width=75 * columns) + tree


def _generations(run: Run) -> str:
    bred = [g for g in range(run.settings.population.generations) if run.population(g)]
    if not bred:
        return '<p class="muted">No generation has begun.</p>'
    parts = []
    if len(bred) > LATEST:
        parts.append(f'<p class="muted">The last {LATEST} of {len(bred)} generations.</p>')
    for generation in bred[-LATEST:]:
        parts.append(f"<h3>Generation {generation}</h3>")
        result = run.result(generation)
        if result and result.verdict:
            parts.append(f"<p>{escape(result.verdict.verdict)}</p>")
        for draw in (figures.training_curves, figures.scores, figures.gate_verdict):
            parts.append(_figure(draw(run, generation), titled=True))
    return "\n".join(parts)


def _settings(run: Run) -> str:
    parts = [_lines(cost_lines(run)), f"<pre>{escape(config.dump(run.settings))}</pre>"]
    record = run.folder / "run.json"
    if record.exists():
        text = json.dumps(files.read_json(record), indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>run.json: suite digest, base model, versions</summary>"
                     f"<pre>{escape(text)}</pre></details>")  # fmt: skip
    return "".join(parts)


def _reproduce(run: Run) -> str:
    name = run.settings.name
    return (
        f"<p>Save the settings above as <code>experiments/{escape(name)}.yaml</code> and run:</p>"
        f"<pre>agentlab evolve experiments/{escape(name)}.yaml\nagentlab report experiments/{escape(name)}.yaml</pre>"
        f"<p>The same settings and the same suite lead to the same run, <code>{escape(run.id)}</code>. With the same "
        f"versions on the same CPU and number of threads the adapters are the same byte for byte; on a GPU scores can "
        f"differ in the last places. Every random draw follows from seed {run.settings.seed}.</p>"
    )


def _figure(figure: "go.Figure", note: str = "", *, titled: bool = False, min_width: int = 0) -> str:
    # the page's headings say what the title says, and do not run into the legend on a narrow screen
    heading = f"<h4>{figure.layout.title.text}</h4>" if titled else ""
    figure.update_layout(title=None, margin={"t": 60})
    height = int(figure.layout.height or 420)
    # plotly escapes "<" in its JSON, so that no text can close the element
    data = figure.to_json()
    lead = f'<p class="muted">{escape(note)}</p>' if note else ""
    style = f"height:{height}px" + (f";min-width:{min_width}px" if min_width else "")
    return (
        f'{heading}{lead}<div class="wide"><div class="figure" style="{style}"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def _lines(lines: list[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
