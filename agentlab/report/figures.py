"""The figures of a run, each drawn from its records alone; every one returns a plotly Figure that stands by itself."""

from typing import TYPE_CHECKING

from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate, Score
from agentlab.report import look, words
from agentlab.report.generation_figures import gate_verdict, scores, training_curves
from agentlab.report.lineage import lineage

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["fitness_by_generation", "gate_verdict", "lineage", "scores", "tradeoff", "training_curves"]


def fitness_by_generation(run: Run) -> "go.Figure":
    """Every candidate's fitness with the 95 % interval of its score, the best so far, and the base model's line."""
    title = "Fitness by generation"
    candidates = run.candidates()
    scored = [(c, c.score) for c in candidates if c.score is not None]
    if not scored:
        return look.nothing_yet(title, "No candidate has a score yet.")
    places = _places(candidates)
    champion = run.champion()
    figure = look.new_figure(title, height=460)
    for label, colour, members in (
        ("kept so far", look.STATE["kept"], [p for p in scored if p[0].state not in ("culled", "failed")]),
        ("culled", look.STATE["culled"], [p for p in scored if p[0].state == "culled"]),
    ):
        if members:
            figure.add_scatter(
                x=[places[c.genome.candidate] for c, _ in members], y=[look.height(s) for _, s in members],
                error_y=look.error_bars([s for _, s in members], colour), mode="markers", name=label,
                marker={"color": colour, "size": 9}, text=[look.hover(c) for c, _ in members],
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    failed = [c for c in candidates if c.state == "failed"]
    if failed:
        figure.add_scatter(
            x=[places[c.genome.candidate] for c in failed], y=[0] * len(failed), mode="markers",
            name="failed, no score", text=[look.hover(c) for c in failed],
            marker={"color": look.STATE["failed"], "symbol": "x", "size": 9},
            hovertemplate="%{text}<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    _best_so_far(figure, scored)
    for candidate, score in scored:
        if candidate.genome.candidate == champion:
            figure.add_scatter(
                x=[places[champion]], y=[look.height(score)], mode="markers", name=f"champion {champion}",
                hoverinfo="skip",
                marker={"symbol": "circle-open", "size": 18, "line": {"width": 3}, "color": look.CHAMPION},
            )  # fmt: skip
    base = run.score(BASE, "fitness")
    _line(figure, look.height(base) if base else None, "base model")
    figure.update_xaxes(look.generation_axis(max(c.genome.generation for c in candidates) + 1))
    figure.update_yaxes(title={"text": "fitness (score − penalties)"}, rangemode="tozero")
    return figure


def _best_so_far(figure: "go.Figure", scored: list[tuple[Candidate, Score]]) -> None:
    best: dict[int, float] = {}
    for candidate, score in scored:
        generation = candidate.genome.generation
        best[generation] = max(best.get(generation, float("-inf")), look.height(score))
    x: list[float] = []
    y: list[float] = []
    so_far = float("-inf")
    for generation in range(max(best) + 1):
        so_far = max(so_far, best.get(generation, so_far))
        x += [generation - 0.5, generation + 0.5]
        y += [so_far, so_far]
    figure.add_scatter(x=x, y=y, mode="lines", name="best so far", line={"color": look.GREEN, "width": 2},
                       hovertemplate="best so far %{y:.3f}<extra></extra>")  # fmt: skip


def tradeoff(run: Run) -> "go.Figure":
    """Accuracy against latency with the target; a marker's area is the peak memory (VRAM, or RAM without a GPU)."""
    title = "Accuracy against latency"
    scored: list[tuple[str, str, Score, str]] = [
        (c.genome.candidate, c.state, c.score, look.hover(c)) for c in run.candidates() if c.score
    ]
    if base := run.score(BASE, "fitness"):
        scored.append((BASE, BASE, base, "<br>".join(["<b>base model</b>", *look.score_lines(base)])))
    if not scored:
        return look.nothing_yet(title, "Nothing has been scored yet.")
    measured = all(score.latency_p50_s is not None for _, _, score, _ in scored)
    on_gpu = any(score.vram_peak_mib for _, _, score, _ in scored)
    memory = {name: score.vram_peak_mib if on_gpu else score.ram_peak_mib for name, _, score, _ in scored}
    largest = max(memory.values()) or 1.0
    champion = run.champion()
    figure = look.new_figure(title, height=460)
    for label, colour, symbol, states in (
        ("kept so far", look.STATE["kept"], "circle", ("bred", "trained", "evaluated", "kept")),
        ("culled", look.STATE["culled"], "circle", ("culled", "failed")),
        ("base model", look.BASE_LINE, "square", (BASE,)),
    ):
        points = [p for p in scored if p[1] in states]
        if points:
            figure.add_scatter(
                x=[s.latency_p50_s if measured else s.latency_estimated_s for _, _, s, _ in points],
                y=[s.accuracy for _, _, s, _ in points], mode="markers", name=label, text=[p[3] for p in points],
                hovertemplate="%{text}<extra></extra>", cliponaxis=False,
                marker={"size": [max(7, 22 * (memory[p[0]] / largest) ** 0.5) for p in points], "color": colour,
                        "symbol": symbol, "opacity": 0.75,
                        "line": {"width": [3 if p[0] == champion else 1 for p in points],
                                 "color": [look.CHAMPION if p[0] == champion else "white" for p in points]}},
            )  # fmt: skip
    target = run.settings.budget.latency_s
    figure.add_vline(x=target, line={"color": look.TARGET, "dash": "dash"},
                     annotation={"text": f"target {target:g} s", "font": {"color": look.TARGET}, "yanchor": "top",
                                 "xanchor": "right", "y": 1})  # fmt: skip
    kind = "measured, p50 of single answers" if measured else "estimated from token counts"
    figure.update_xaxes(title={"text": f"latency (s; {kind})"}, rangemode="tozero")
    figure.update_yaxes(look.share_axis("accuracy on the fitness items"))
    plan = run.planned_mib()
    planned = "" if plan is None else f" ({words.mebibytes(plan['evaluate'])} planned)"
    kind = "VRAM" if on_gpu else "RAM"
    figure.add_annotation(
        text=f"area: peak {kind}, largest {words.mebibytes(largest)}{planned}; orange ring: champion",
        x=0, y=0, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False,
        font={"size": 11, "color": look.MUTED},
    )  # fmt: skip
    return figure


def _places(candidates: list[Candidate]) -> dict[str, float]:
    """x of each candidate: its generation, spread out so that intervals lie side by side."""
    siblings: dict[int, list[str]] = {}
    for candidate in candidates:
        siblings.setdefault(candidate.genome.generation, []).append(candidate.genome.candidate)
    return {
        name: generation + (index - (len(names) - 1) / 2) * min(0.14, 0.7 / len(names))
        for generation, names in siblings.items()
        for index, name in enumerate(names)
    }


def _line(figure: "go.Figure", y: float | None, label: str) -> None:
    if y is None:
        return
    figure.add_hline(y=y, line={"color": look.BASE_LINE, "dash": "dash"})
    figure.add_scatter(x=[None], y=[None], mode="lines", name=f"{label} {y:.3f}",
                       line={"color": look.BASE_LINE, "dash": "dash"})  # fmt: skip
