"""The family tree as text for a terminal."""

from agentlab.evolution.run import Run
from agentlab.records import BASE, Candidate, GenerationResult
from agentlab.report import words

WIDTH = 98  # two less than 100, so that it may be indented


def family_tree(run: Run) -> str:
    """One line per candidate under its generation: who bred it, its score, what became of it; at most 98 columns."""
    base = run.score(BASE, "fitness")
    lines = [
        words.pad("base model", 48) + (_accuracy(base.accuracy, base.accuracy_ci_low, base.accuracy_ci_high)
                                       if base else "no score yet")
    ]  # fmt: skip
    results = {result.generation: result for result in run.results()}
    by_generation: dict[int, list[Candidate]] = {}
    for candidate in run.candidates():
        by_generation.setdefault(candidate.genome.generation, []).append(candidate)
    for generation, members in sorted(by_generation.items()):
        result = results.get(generation)
        lines.append(words.clip(f"generation {generation}{_elites(result, generation)}", WIDTH))
        for index, candidate in enumerate(members):
            branch = "  └─ " if index == len(members) - 1 else "  ├─ "
            lines.append((branch + _line(candidate, _star(candidate, run, results))).rstrip())
    if not by_generation:
        lines.append("no candidate has been bred yet")
    return "\n".join(lines)


def _elites(result: GenerationResult | None, generation: int) -> str:
    if result is None:
        return " (unfinished)"
    elites = [name for name in result.members if not name.startswith(f"g{generation:03d}-")]
    return f" (competes again: {', '.join(elites)})" if elites else ""


def _star(candidate: Candidate, run: Run, results: dict[int, GenerationResult]) -> str:
    name = candidate.genome.candidate
    if name == run.champion():
        return "★ champion"
    return "☆ former champion" if any(result.champion == name for result in results.values()) else ""


def _line(candidate: Candidate, star: str) -> str:
    score = candidate.score
    if candidate.state == "failed":
        outcome = f"failed: {words.clean(candidate.reason)}"
    elif score is None:
        outcome = f"{candidate.state}, no score yet"
    else:
        accuracy = _accuracy(score.accuracy, score.accuracy_ci_low, score.accuracy_ci_high)
        outcome = f"{words.pad(accuracy, 33)}{star or candidate.state}"
    left = words.pad(f"{candidate.genome.candidate}  {origin(candidate)}", 43)
    return words.clip(left + outcome, WIDTH - 5)


def origin(candidate: Candidate) -> str:
    """Who bred a candidate, short: "g000-c01 62 % × g000-c04 38 %"."""
    genome = candidate.genome
    if genome.operator == "blend":
        return f"blend of {' and '.join(genome.parents)}"
    if len(genome.parents) > 1:
        weights = genome.merge_weights or [1 / len(genome.parents)] * len(genome.parents)
        pairs = zip(genome.parents, weights, strict=False)
        return " × ".join(f"{parent} {100 * weight:.0f} %" for parent, weight in pairs)
    if genome.parents:
        return f"{genome.operator} of {genome.parents[0]}"
    return genome.operator


def _accuracy(value: float, low: float, high: float) -> str:
    filled = round(10 * value)
    return f"{'█' * filled}{'░' * (10 - filled)} {words.percent(value):>7} ({words.interval(low, high)})"
