"""The one look of all figures: white, readable when small, and told apart by eyes of every kind (Okabe and Ito)."""

from html import escape
from typing import TYPE_CHECKING

from agentlab.records import Candidate, Score
from agentlab.report import words

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e4e7eb"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = [BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, "#7a5c00", INK]
DASHES = ["solid", "dash", "dot", "dashdot"]
STATE = {"kept": BLUE, "culled": "#9fb3c8", "failed": VERMILLION}
CHAMPION, BASE_LINE, TARGET = ORANGE, MUTED, VERMILLION
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Noto Sans CJK JP', sans-serif"


def new_figure(title: str, height: int = 420) -> "go.Figure":
    """An empty figure in the shared look; the legend lies above the plot, so that a narrow screen keeps its width."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "ticks": "outside", "tickcolor": MUTED,
        "automargin": True, "title": {"standoff": 10, "font": {"size": 13}},
    }  # fmt: skip
    figure = go.Figure()
    figure.update_layout(
        template=go.layout.Template(),
        title={"text": escape(title), "x": 0, "xref": "paper", "yref": "container", "y": 0.98, "yanchor": "top",
               "font": {"size": 16}},
        font={"family": FONT, "size": 13, "color": INK}, height=height, colorway=CYCLE,
        paper_bgcolor="white", plot_bgcolor="white", hovermode="closest",
        hoverlabel={"bgcolor": "white", "bordercolor": MUTED, "align": "left", "font": {"color": INK}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(255,255,255,0.8)"},
        margin={"l": 10, "r": 20, "t": 84, "b": 10},
        xaxis=axis, yaxis=axis,
        # plotly's own toolbar offers to upload the figure: nothing leaves this machine by a stray click
        modebar={"remove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"]},
    )  # fmt: skip
    return figure


def share_axis(title: str) -> dict[str, object]:
    """Settings of an axis that shows a share of items as percent."""
    return {"title": {"text": title}, "tickformat": ".0%", "rangemode": "tozero"}


def nothing_yet(title: str, why: str) -> "go.Figure":
    """A figure that says in words that there is nothing to draw."""
    figure = new_figure(title, height=180)
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.add_annotation(text=escape(why), showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper",
                          font={"color": MUTED, "size": 14})  # fmt: skip
    return figure


def generation_axis(count: int) -> dict[str, object]:
    """Settings of an axis with one whole tick per generation while they fit."""
    step = max(1, -(-count // 15))
    return {"title": {"text": "generation"}, "tick0": 0, "dtick": step, "range": [-0.6, max(count, 1) - 0.4]}


def ancestry(candidate: Candidate) -> str:
    """ "crossover of g000-c01 (62 %) and g000-c03 (38 %)"."""
    genome = candidate.genome
    if not genome.parents:
        return genome.operator
    if len(genome.parents) > 1:
        weighted = zip(genome.parents, genome.merge_weights, strict=False)
        return f"{genome.operator} of " + " and ".join(
            f"{parent} ({100 * weight:.0f} %)" for parent, weight in weighted
        )
    return f"{genome.operator} of {genome.parents[0]}"


def hover(candidate: Candidate) -> str:
    """What a figure says about a candidate under the pointer: escaped, one fact a line."""
    genome, score = candidate.genome, candidate.score
    lines = [f"<b>{escape(genome.candidate)}</b> · {candidate.state}", escape(ancestry(candidate))]
    if genome.mutated:
        lines.append("mutated: " + escape(", ".join(genome.mutated)))
    if score:
        lines += score_lines(score)
    lines.append(f"learning rate {genome.learning_rate:.2g} · {genome.steps} steps · rank {genome.rank}")
    if candidate.training:
        took = f"trained in {words.duration(candidate.training.train_seconds)}"
        peak = candidate.training.vram_peak_mib or candidate.training.ram_peak_mib
        lines.append(f"{took} · peak {words.mebibytes(peak)}" if peak else took)
    if candidate.reason:
        lines.append("failed: " + escape(words.clip(words.clean(candidate.reason), 90)))
    return "<br>".join(lines)


def score_lines(score: Score) -> list[str]:
    """Accuracy, fitness, latency and memory of one score as hover lines."""
    interval = words.interval(score.accuracy_ci_low, score.accuracy_ci_high)
    lines = [f"accuracy {words.percent(score.accuracy)} (95 % interval {interval})"]
    if score.fitness is not None:
        lines.append(f"fitness {score.fitness:.3f}")
    p50, p95 = words.seconds(score.latency_p50_s), words.seconds(score.latency_p95_s)
    lines.append(f"latency p50 {p50} · p95 {p95} · estimated {words.seconds(score.latency_estimated_s)}")
    lines.append(f"peak VRAM {words.mebibytes(score.vram_peak_mib)} · RAM {words.mebibytes(score.ram_peak_mib)}")
    return lines


def height(score: Score) -> float:
    """The fitness, or the accuracy where fitness was not computed."""
    return score.accuracy if score.fitness is None else score.fitness


def error_bars(found: list[Score], colour: str) -> dict[str, object]:
    """Error bars: the interval of the accuracy, which is that of the fitness too, shifted by its fixed penalties."""
    return {
        "type": "data", "symmetric": False, "thickness": 1.5, "width": 4, "color": colour,
        "array": [max(0.0, s.accuracy_ci_high - s.accuracy) for s in found],
        "arrayminus": [max(0.0, s.accuracy - s.accuracy_ci_low) for s in found],
    }  # fmt: skip
