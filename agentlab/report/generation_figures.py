"""The figures of one generation: scores, training curves, the gate's verdict."""

from html import escape
from typing import TYPE_CHECKING, Any

from agentlab.evolution.run import Run
from agentlab.records import BASE
from agentlab.report import look, words

if TYPE_CHECKING:
    import plotly.graph_objects as go


_FEW_STEPS = 12


def scores(run: Run, generation: int) -> "go.Figure":
    """Accuracy on the fitness split of everyone who competed in a generation, best on top, with 95 % intervals."""
    title = f"Scores in generation {generation}"
    result = run.result(generation)
    names = result.members if result else [g.candidate for g in run.population(generation) or []]
    found = [c for name in dict.fromkeys(names) if (c := run.candidate(name)) and c.score]
    if not found:
        return look.nothing_yet(title, "No candidate of this generation has a score yet.")
    pairs = sorted(((c, c.score) for c in found if c.score), key=lambda pair: look.height(pair[1]))
    figure = look.new_figure(title, height=150 + 34 * len(pairs))
    labels = [f"{c.genome.candidate} {'elite' if c.genome.generation < generation else c.genome.operator}"
              for c, _ in pairs]  # fmt: skip
    figure.add_scatter(
        x=[s.accuracy for _, s in pairs], y=labels, mode="markers", name="accuracy, 95 % interval",
        marker={"color": look.BLUE, "size": 10}, text=[look.hover(c) for c, _ in pairs],
        error_x=look.error_bars([s for _, s in pairs], look.BLUE), hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[look.height(s) for _, s in pairs], y=labels, mode="markers", name="fitness (after penalties)",
        marker={"color": look.VERMILLION, "size": 9, "symbol": "line-ns-open", "line": {"width": 2}},
        hovertemplate="fitness %{x:.3f}<extra></extra>",
    )  # fmt: skip
    base = run.score(BASE, "fitness")
    if base:
        figure.add_vline(x=base.accuracy, line={"color": look.BASE_LINE, "dash": "dash"})
        figure.add_scatter(x=[None], y=[labels[0]], mode="lines", name=f"base model {words.percent(base.accuracy)}",
                           line={"color": look.BASE_LINE, "dash": "dash"})  # fmt: skip
    figure.update_xaxes(look.share_axis("accuracy on the fitness items"))
    return figure


def training_curves(run: Run, generation: int) -> "go.Figure":
    """Loss per optimiser step of each candidate of a generation; a remedy (lower rate, smaller batch) is marked."""
    title = f"Training in generation {generation}"
    trained = [(c, c.training) for g in run.population(generation) or [] if (c := run.candidate(g.candidate))]
    curves = [(c, t) for c, t in trained if t is not None and t.losses]
    if not curves:
        return look.nothing_yet(title, "No candidate of this generation has been trained yet.")
    figure = look.new_figure(title, height=400)
    for index, (candidate, training) in enumerate(curves):
        name, colour = candidate.genome.candidate, look.CYCLE[index % len(look.CYCLE)]
        steps = list(range(1, len(training.losses) + 1))
        dash = look.DASHES[index // len(look.CYCLE) % len(look.DASHES)]
        figure.add_scatter(
            x=steps, y=training.losses, mode="lines+markers", name=name, marker={"size": 5},
            line={"color": colour, "width": 2, "dash": dash},
            hovertemplate=f"{name}<br>step %{{x}}, loss %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
        if training.remedies:
            lines = [_remedy(remedy) for remedy in training.remedies]
            figure.add_scatter(
                x=[training.remedies[-1].get("step", 1)], y=[training.losses[0]], mode="markers",
                name=f"{name}: {words.counted(len(lines), 'remedy', 'remedies')}",
                marker={"symbol": "diamond-open", "size": 15, "color": colour, "line": {"width": 2.5}},
                text=["<br>".join([f"<b>{name}</b>: started again after", *lines])],
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    # between few steps plotly would put ticks at halves, and name each step twice
    few = max(len(training.losses) for _, training in curves) <= _FEW_STEPS
    figure.update_xaxes(title={"text": "optimiser step"}, tickformat="d", dtick=1 if few else None)
    figure.update_yaxes(title={"text": "loss (nats per token)"}, rangemode="tozero")
    return figure


def _remedy(remedy: dict[str, Any]) -> str:
    parts = [f"{remedy.get('problem', 'a problem')}: {remedy.get('action', 'tried again')}".replace("_", " ")]
    if rate := remedy.get("learning_rate"):
        parts.append(f"learning rate {rate:.2g}")
    if batch := remedy.get("batch_size"):
        parts.append(f"batch {batch} × {remedy.get('accumulation', 1)}")
    return escape(", ".join(parts))


def gate_verdict(run: Run, generation: int) -> "go.Figure":
    """The gate in one picture: items that only one of the two got right, and both accuracies with 95 % intervals."""
    title = f"Gate of generation {generation}"
    result = run.result(generation)
    verdict = result.verdict if result else None
    if result is None:
        return look.nothing_yet(title, "This generation has not reached the gate yet.")
    if verdict is None:
        return look.nothing_yet(title, "Nobody challenged the champion in this generation.")
    title += f": {verdict.challenger} {'promoted' if verdict.passed else 'not promoted'}"
    figure = look.new_figure(title, height=230)
    for name, accuracy, colour in (
        (verdict.incumbent, verdict.incumbent_accuracy, look.BASE_LINE),
        (verdict.challenger, verdict.challenger_accuracy, look.GREEN if verdict.passed else look.VERMILLION),
    ):
        score = run.score(name, "gate")
        label = "base model" if name == BASE else name
        figure.add_scatter(
            x=[accuracy], y=[label], mode="markers+text", text=[words.percent(accuracy)], textposition="top center",
            marker={"color": colour, "size": 11}, showlegend=False,
            error_x=look.error_bars([score], colour) if score else None,
            hovertemplate=f"{label}: %{{text}} of {verdict.items} items<extra></extra>", cliponaxis=False,
        )  # fmt: skip
    figure.update_xaxes(look.share_axis(f"accuracy on the {verdict.items} gate items"), range=[-0.02, 1.02])
    figure.update_yaxes(range=[-0.6, 1.7])
    figure.add_annotation(
        text=f"only the challenger right: <b>{verdict.wins}</b> · only the incumbent: <b>{verdict.losses}</b><br>"
        f"p = {verdict.p_value:.2g}, needed ≤ {verdict.alpha:.2g}",
        x=0, y=1.02, xref="paper", yref="paper", xanchor="left", yanchor="bottom", showarrow=False, align="left",
    )  # fmt: skip
    return figure
