"""Parts of the report that show records: the table of candidates, and what base and champion answered."""

from collections.abc import Mapping
from html import escape

from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate, Score
from agentlab.report import words
from agentlab.report.tables import score_of, text_of
from agentlab.report.tree import origin

PER_GROUP = 25  # items shown of each kind
LONGEST = 3000  # characters of one text


def candidates_html(run: Run) -> str:
    """Every candidate with its scores and genome, in breeding order; the champion is marked."""
    champion, candidates = run.champion(), run.candidates()
    if not candidates:
        return '<p class="muted">No candidate has been bred yet.</p>'
    columns = [name for name in _cells(candidates[0], champion) if name not in _hidden(candidates)]
    head = "".join(f'<th class="{_kind(name)}">{escape(name)}</th>' for name in columns)
    rows = []
    for candidate in candidates:
        cells = _cells(candidate, champion)
        state = "champion" if candidate.genome.candidate == champion else candidate.state
        data = "".join(f'<td class="{_kind(name)}">{escape(cells[name])}</td>' for name in columns)
        rows.append(f'<tr class="{state}">{data}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _hidden(candidates: list[Candidate]) -> set[str]:
    return set() if any(c.score and c.score.vram_peak_mib for c in candidates) else {"VRAM MiB"}


def _kind(column: str) -> str:
    return {"candidate": "name", "bred by": "name", "state": "name", "note": "text"}.get(column, "number")


def _cells(candidate: Candidate, champion: str) -> dict[str, str]:
    genome, score, training = candidate.genome, candidate.score, candidate.training
    fitness = score.fitness if score else None
    return {
        "candidate": genome.candidate + (" ★" if genome.candidate == champion else ""),
        "bred by": origin(candidate),
        "state": candidate.state,
        "fitness": "" if fitness is None else f"{fitness:.3f}",
        "accuracy": words.percent(score.accuracy) if score else "",
        "95 % interval": words.interval(score.accuracy_ci_low, score.accuracy_ci_high) if score else "",
        "p50 s": _two(score.latency_p50_s) if score else "",
        "p95 s": _two(score.latency_p95_s) if score else "",
        "RAM MiB": f"{score.ram_peak_mib:.0f}" if score else "",
        "VRAM MiB": f"{score.vram_peak_mib:.0f}" if score else "",
        "learning rate": f"{genome.learning_rate:.2g}",
        "steps": str(genome.steps),
        "rank": str(genome.rank),
        "trained s": f"{training.train_seconds:.1f}" if training else "",
        "tokens": f"{training.train_tokens:,}" if training else "",
        "note": "; ".join(_notes(candidate)),
    }


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _notes(candidate: Candidate) -> list[str]:
    genome, training = candidate.genome, candidate.training
    notes = []
    if genome.mutated:
        notes.append("mutated " + ", ".join(genome.mutated))
    if genome.advisor != "chance":
        notes.append(f"proposed by {genome.advisor}")
    if training and training.remedies:
        notes.append(words.counted(len(training.remedies), "remedy", "remedies"))
    if candidate.reason:
        notes.append(words.clip(words.clean(candidate.reason), 300))
    return notes


def answers_html(run: Run, prompts: Mapping[str, Mapping[str, str]], expected: Mapping[str, Mapping[str, str]]) -> str:
    """What the champion got wrong or lost, and some of what it gained, with both models' answers.

    From the sealed record; before the seal was opened, from the gate's items.
    """
    sealed = run.sealed()
    split, champion = ("test", sealed.champion) if sealed else ("gate", run.champion())
    own, base = score_of(run, champion, split), score_of(run, BASE, split)
    if own is None or base is None:
        return '<p class="muted">Neither the sealed test nor the gate has been answered by both models yet.</p>'
    where = "sealed test" if split == "test" else "gate items (the sealed test has not been answered)"
    parts = [f"<p>From the {where}; both models answered the same {words.counted(len(own.answers), 'item')}.</p>"]
    for title, wanted in _groups(own, base, champion):
        shown = wanted[:PER_GROUP]
        count = words.counted(len(wanted), "item")
        parts.append(f"<h3>{escape(title)}: {count}</h3>")
        if len(shown) < len(wanted):
            parts.append(f'<p class="muted">The first {len(shown)} are shown.</p>')
        for item in shown:
            prompt, answer = text_of(prompts.get(split), item), text_of(expected.get(split), item)
            parts.append(_item(item, prompt, answer, champion, own, base))
    return "\n".join(parts)


def _groups(own: Score, base: Score, champion: str) -> list[tuple[str, list[int]]]:
    items = range(min(len(own.item_scores), len(base.item_scores)))
    wrong = [i for i in items if own.item_scores[i] < 1]
    if champion == BASE:
        return [("The base model is wrong", wrong)]
    return [
        ("Lost: the base was right, the champion is wrong", [i for i in wrong if base.item_scores[i] >= 1]),
        ("Both are wrong", [i for i in wrong if base.item_scores[i] < 1]),
        ("Gained: the base was wrong, the champion is right",
         [i for i in items if base.item_scores[i] < 1 <= own.item_scores[i]]),
    ]  # fmt: skip


def _item(item: int, prompt: str, expected: str, champion: str, own: Score, base: Score) -> str:
    parts = [f'<div class="item"><div class="label">item {item}</div>']
    if prompt:
        parts.append(f'<pre class="answer">{_text(prompt)}</pre>')
    if expected:
        parts.append(f'<div class="label">expected</div><pre class="answer">{_text(expected)}</pre>')
    parts.append('<div class="pair">')
    models = [("base model", base)] + ([(f"champion {champion}", own)] if champion != BASE else [])
    for name, score in models:
        points = score.item_scores[item]
        mark = ("right", "✓ right") if points >= 1 else ("wrong", "✗ wrong" if points <= 0 else f"{points:.2f} of 1")
        parts.append(
            f'<div><span class="label">{escape(name)}</span> <span class="{mark[0]}">{mark[1]}</span>'
            f'<pre class="answer">{_text(score.answers[item]) or "<i>(empty)</i>"}</pre></div>'
        )
    return "".join(parts) + "</div></div>"


def _text(text: str) -> str:
    cut = text[:LONGEST]
    more = f"\n… {len(text) - LONGEST:,} more characters" if len(text) > LONGEST else ""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in cut)
    return escape(shown) + more
