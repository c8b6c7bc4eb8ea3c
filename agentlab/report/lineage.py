"""The family graph: who was bred from whom, how well it did, and what became of it."""

from typing import TYPE_CHECKING

from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate
from agentlab.report import look, words

if TYPE_CHECKING:
    import plotly.graph_objects as go

_BESIDE = 0.35  # of the way to the next generation, where a blend stands


def lineage(run: Run) -> "go.Figure":
    """Generations from left to right, an edge from each parent (its width is the merge weight), colour is accuracy.

    The champion wears a ring, culled candidates are faded, failed ones crossed.
    """
    title = "Family tree"
    candidates = run.candidates()
    if not candidates:
        return look.nothing_yet(title, "No candidate has been bred yet.")
    spots = _layout(candidates)
    generations = max(c.genome.generation for c in candidates) + 1
    most = max(sum(c.genome.generation == g and not _is_blend(c) for c in candidates) for g in range(generations))
    figure = look.new_figure(title, height=max(300, 170 + 66 * most))
    _edges(figure, candidates, spots)
    short = generations > 9
    base = run.score(BASE, "fitness")
    figure.add_scatter(
        x=[-1], y=[0], mode="markers+text", text=["base"], textposition="top center", showlegend=False,
        marker={"symbol": "square", "size": 20, **_colour([base.accuracy if base else 0.0]),
                "line": {"color": look.MUTED, "width": 1}},
        hovertext=["<br>".join(["<b>base model</b>", *(look.score_lines(base) if base else ["no score yet"])])],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    for label, members in (
        ("kept so far", [c for c in candidates if c.score and c.state != "culled"]),
        ("culled", [c for c in candidates if c.score and c.state == "culled"]),
        ("no score yet", [c for c in candidates if not c.score and c.state != "failed"]),
        ("failed", [c for c in candidates if not c.score and c.state == "failed"]),
    ):
        if members:
            _nodes(figure, label, members, spots, short, run.champion())
    champion = run.champion()
    if champion in spots:
        x, y = spots[champion]
        figure.add_scatter(
            x=[x], y=[y], mode="markers", name="champion", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 33, "color": look.CHAMPION, "line": {"width": 4}},
        )  # fmt: skip
    columns = list(range(-1, generations))
    step = max(1, -(-generations // 15))
    figure.update_xaxes(
        title={"text": "generation"}, range=[-1.5, generations - 0.5], showgrid=False,
        tickvals=columns[:1] + columns[1::step], ticktext=["base", *(str(g) for g in columns[1::step])],
    )  # fmt: skip
    figure.update_yaxes(visible=False, range=[-most / 2 - 0.35, most / 2 + 0.35])
    figure.update_layout(coloraxis={
        "colorscale": "Viridis", "cmin": 0, "cmax": 1,
        "colorbar": {"title": {"text": "accuracy", "side": "right"}, "tickformat": ".0%", "thickness": 12, "len": 0.8},
    })  # fmt: skip
    return figure


def _layout(candidates: list[Candidate]) -> dict[str, tuple[float, float]]:
    """Places (generation, height): siblings ordered by the mean height of their parents, so that edges cross less.

    A blend stands beside its parents, which are of its own generation, and between them.
    """
    spots: dict[str, tuple[float, float]] = {BASE: (-1.0, 0.0)}
    by_generation: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        if not _is_blend(candidate):
            by_generation.setdefault(candidate.genome.generation, []).append(candidate)
    for generation, siblings in sorted(by_generation.items()):
        heights = {}
        for index, candidate in enumerate(siblings):
            known = [spots[parent][1] for parent in candidate.genome.parents if parent in spots]
            # founders among children have no place of their own: below everybody else
            heights[candidate.genome.candidate] = sum(known) / len(known) if known else -1e3 - index
        ordered = sorted(heights, key=lambda name: -heights[name])
        for index, name in enumerate(ordered):
            spots[name] = (float(generation), (len(ordered) - 1) / 2 - index)
        for blend in filter(_is_blend, candidates):
            if blend.genome.generation == generation:
                averaged = [spots[parent][1] for parent in blend.genome.parents if parent in spots]
                middle = sum(averaged) / len(averaged) if averaged else 0.0
                spots[blend.genome.candidate] = (generation + _BESIDE, middle)
    return spots


def _is_blend(candidate: Candidate) -> bool:
    return candidate.genome.operator == "blend"


def _edges(figure: "go.Figure", candidates: list[Candidate], spots: dict[str, tuple[float, float]]) -> None:
    founders: list[tuple[str, str, float]] = []
    bred: list[tuple[str, str, float]] = []
    for candidate in candidates:
        genome = candidate.genome
        weights = genome.merge_weights if len(genome.merge_weights) == len(genome.parents) else []
        for index, parent in enumerate(genome.parents):
            if parent in spots:
                bred.append((parent, genome.candidate, weights[index] if weights else 1 / len(genome.parents)))
        if not genome.parents:
            founders.append((BASE, genome.candidate, 1.0))
    for edges, dash in ((founders, "dot"), (bred, "solid")):
        for parent, child, weight in edges:
            (x0, y0), (x1, y1) = spots[parent], spots[child]
            figure.add_scatter(
                x=[x0, x1], y=[y0, y1], mode="lines", hoverinfo="skip", showlegend=False,
                line={"color": "#b3bdc9" if dash == "solid" else look.GRID, "width": 0.8 + 3 * weight, "dash": dash},
            )  # fmt: skip
    middles = [(*_point(spots[p], spots[c], 0.4), f"{p} → {c}<br>merge weight {100 * w:.0f} %") for p, c, w in bred]
    figure.add_scatter(
        x=[m[0] for m in middles], y=[m[1] for m in middles], text=[m[2] for m in middles], mode="markers",
        marker={"size": 9, "opacity": 0}, hovertemplate="%{text}<extra></extra>", showlegend=False,
    )  # fmt: skip


def _point(a: tuple[float, float], b: tuple[float, float], along: float) -> tuple[float, float]:
    return a[0] + along * (b[0] - a[0]), a[1] + along * (b[1] - a[1])


def _nodes(
    figure: "go.Figure",
    label: str,
    members: list[Candidate],
    spots: dict[str, tuple[float, float]],
    short: bool,
    champion: str,
) -> None:
    names = [c.genome.candidate for c in members]
    marker: dict[str, object]
    if label in ("kept so far", "culled"):
        marker = _colour([c.score.accuracy for c in members if c.score])
    elif label == "failed":
        marker = {"color": look.STATE["failed"], "symbol": "x"}
    else:
        marker = {"color": "white"}
    if label != "failed":  # a colour scale has no one colour for the legend
        key = {"size": 13, "color": {"culled": "#d3dae2", "no score yet": "white"}.get(label, look.MUTED)}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=label, legendgroup=label,
                           marker={**key, "line": {"color": look.MUTED, "width": 1}})  # fmt: skip
    figure.add_scatter(
        x=[spots[name][0] for name in names], y=[spots[name][1] for name in names], mode="markers+text", name=label,
        text=[_label(c, short, name == champion) for name, c in zip(names, members, strict=True)],
        # lines to the next generation pass above a blend
        textposition=["bottom center" if _is_blend(c) else "top center" for c in members],
        textfont={"size": 11, "color": look.MUTED if label == "culled" else look.INK},
        hovertext=[look.hover(c) for c in members], hovertemplate="%{hovertext}<extra></extra>",
        showlegend=label == "failed", legendgroup=label,
        marker={"size": 14 if label == "failed" else 20, "opacity": 0.4 if label == "culled" else 1,
                "line": {"color": look.MUTED, "width": 1}, **marker},
    )  # fmt: skip


def _colour(values: list[float]) -> dict[str, object]:
    return {"color": values, "coloraxis": "coloraxis"}


def _label(candidate: Candidate, short: bool, crowned: bool) -> str:
    """Name and accuracy; an empty line keeps the champion's clear of its ring."""
    name = candidate.genome.candidate
    text = (name[5:] if short else name) + _percent(candidate)
    if not crowned:
        return text
    return f" <br>{text}" if _is_blend(candidate) else f"{text}<br> "


def _percent(candidate: Candidate) -> str:
    return f"<br>{words.percent(candidate.score.accuracy)}" if candidate.score else ""
