"""What a person reads in the terminal when a run ends: what was gained, at which price, and where to look next."""

import os
from collections.abc import Sequence
from pathlib import Path

from agentlab.evolution.run import Run
from agentlab.records import BASE, Score, SealedResult
from agentlab.report import words
from agentlab.report.tree import family_tree

RULE = "─" * 100


def summary(run: Run, *, report: Path | None = None, store: str | None = None, commands: Sequence[str] = ()) -> str:
    """Base against champion on the sealed split, family tree, latency, memory, cost, and where everything lies.

    `store` names the MLflow store, `commands` are printed as they are. What is missing is said, never guessed.
    """
    blocks = [
        f"{run.id}: {headline(run)}",
        _block("Result on the sealed test", sealed_lines(run)),
        _block("Family tree (accuracy on the fitness items that ranked the candidates, 95 % interval)",
               family_tree(run).splitlines()),
        _block("Speed and memory", resource_lines(run)),
        _block("Cost", cost_lines(run)),
        _block("Where to look", _places(run, report, store)),
    ]  # fmt: skip
    if commands:
        blocks.append(_block("Commands", list(commands)))
    return f"{RULE}\n" + "\n\n".join(blocks) + f"\n{RULE}"


def headline(run: Run) -> str:
    """One honest sentence: how far the run came and what it gained."""
    missing = missing_lines(run)
    if missing:
        return "not finished"
    sealed = run.sealed()
    if sealed is None or sealed.champion == BASE:
        return "finished; no candidate passed the gate, so the base model stays"
    verb = "gained" if sealed.gain_ci_low > 0 else "lost" if sealed.gain_ci_high < 0 else "changed"
    gain = words.points(sealed.gain).lstrip("+-") if verb != "changed" else words.points(sealed.gain)
    note = ", which may be chance" if verb == "changed" else ""
    return f"finished; champion {sealed.champion} {verb} {gain} over the base model{note}"


def missing_lines(run: Run) -> list[str]:
    """What an unfinished run still lacks, one sentence each; empty when it is complete."""
    lines = []
    planned, done = run.settings.population.generations, len(run.results())
    if done < planned:
        line = f"{done} of {words.counted(planned, 'generation')} finished"
        states = [c.state for c in run.candidates() if c.genome.generation == done]
        if states:
            counts = {state: states.count(state) for state in dict.fromkeys(states)}
            line += f"; in generation {done}: " + ", ".join(f"{n} {state}" for state, n in counts.items())
        lines.append(line)
    if run.sealed() is None and (done < planned or run.champion() != BASE):
        lines.append("the sealed test has not been answered, so nothing can be said about the gain yet")
    return lines


def sealed_lines(run: Run) -> list[str]:
    """The sealed comparison in words, or why there is none."""
    sealed = run.sealed()
    if sealed is None and not missing_lines(run):
        return ["No candidate passed the gate, so the base model stays and the sealed test was not opened."]
    if sealed is None:
        return [*_sentences(missing_lines(run)), "Run the same command again: it continues where it stopped."]
    lines = [_model("base model", sealed.base)]
    if sealed.champion == BASE:
        return [*lines, "No candidate passed the gate, so the base model is still the champion: no gain to report."]
    gain = (
        f"{words.points(sealed.gain)}  (95 % interval {_signed(sealed.gain_ci_low)} to {_signed(sealed.gain_ci_high)})"
    )
    lines += [_model(f"champion {sealed.champion}", sealed.champion_score), f"{'gain':<22}{gain}"]
    lines += [*_rival_lines(run, sealed), _how(run, sealed)]
    if sealed.gain_ci_low <= 0 <= sealed.gain_ci_high:
        lines.append("The interval includes zero: this run does not show that the champion is better.")
    threshold = run.settings.gate.accuracy_threshold
    if sealed.champion_score.accuracy < threshold:
        lines.append(
            f"! The champion is below the accuracy threshold of {words.percent(threshold)}: do not rely on it."
        )
    if run.champion() != sealed.champion:
        lines.append(f"! The champion is {run.champion()} by now; what you see here was measured before.")
    lines += _sentences(missing_lines(run))
    return lines


def _rival_lines(run: Run, sealed: SealedResult) -> list[str]:
    """The plain SFT of equal cost, when `agentlab baseline` measured it beside this champion."""
    rival = run.baseline()
    if rival is None or rival.champion != sealed.champion:
        return []
    difference = (
        f"{words.points(rival.gain)}  (95 % interval {_signed(rival.gain_ci_low)} to {_signed(rival.gain_ci_high)})"
    )
    return [_model(f"one SFT, {rival.steps} steps", rival.score), f"{'champion over it':<22}{difference}"]


def _how(run: Run, sealed: SealedResult) -> str:
    opened = max(sealed.openings, len(run.openings()))  # a baseline opens it again
    times = {1: "once", 2: "twice"}.get(opened, f"{opened} times")
    return (
        f"{words.counted(sealed.items, 'item')} that nobody trained on or was chosen by; the seal was opened {times}."
    )


def _model(name: str, score: Score) -> str:
    interval = words.interval(score.accuracy_ci_low, score.accuracy_ci_high)
    return f"{name:<22}{words.percent(score.accuracy):<13} (95 % interval {interval})"


def resource_lines(run: Run) -> list[str]:
    """Latency of base and champion against the target, and their peak memory."""
    lines = []
    champion, target = run.champion(), run.settings.budget.latency_s
    models = [("base model", BASE)] + ([(f"champion {champion}", champion)] if champion != BASE else [])
    for label, name in models:
        score = timed(run, name)
        if score is None:
            lines.append(f"{label:<22}not measured yet")
            continue
        if score.latency_p50_s is None or score.latency_p95_s is None:
            latency = f"about {words.seconds(score.latency_estimated_s)}, estimated from token counts"
        else:
            verdict = "within" if score.latency_p95_s <= target else "NOT within"
            latency = f"p50 {words.seconds(score.latency_p50_s)}, p95 {words.seconds(score.latency_p95_s)}"
            if score.latency_answers:
                latency += f" of {words.counted(score.latency_answers, 'single answer')}"
            latency += f": {verdict} the target of {target:g} s"
        lines.append(f"{label:<22}{latency}")
        peak = f"peak RAM {words.mebibytes(score.ram_peak_mib)}"
        if score.vram_peak_mib:
            budget = words.mebibytes(1024 * run.settings.budget.vram_gib)
            peak = f"peak VRAM {words.mebibytes(score.vram_peak_mib)} of {budget}, {peak}"
        lines.append(f"{'':<22}{peak}")
    return lines + planned_lines(run)


def timed(run: Run, adapter: str) -> Score | None:
    """The score whose latency says most, because it is of more answers: on the sealed items, else on fitness ones."""
    sealed = run.sealed()
    if sealed is not None and adapter in (BASE, sealed.champion):
        return sealed.base if adapter == BASE else sealed.champion_score
    return run.score(adapter, "fitness")


def planned_lines(run: Run) -> list[str]:
    """The memory that was planned before anything was loaded, and the largest peaks of all models."""
    planned, plan = run.planned_mib(), run.plan()
    if planned is None or plan is None:
        return []
    place = "VRAM" if plan["machine"]["device"] == "cuda" else "RAM"
    sizes = (
        f"{words.mebibytes(planned['evaluate'])} of {place} to evaluate, {words.mebibytes(planned['train'])} to train"
    )
    lines = [f"{'planned beforehand':<22}{sizes}"]
    of = "vram_peak_mib" if place == "VRAM" else "ram_peak_mib"
    candidates = run.candidates()
    scores = [*(c.score for c in candidates), timed(run, BASE), timed(run, run.champion())]
    phases = (("evaluate", scores), ("train", [c.training for c in candidates]))
    peaks = {name: max((getattr(part, of) for part in parts if part), default=0) for name, parts in phases}
    if measured := [f"{words.mebibytes(peak)} to {name}" for name, peak in peaks.items() if peak]:
        lines.append(f"{'measured at most':<22}{', '.join(measured)}")
    return lines


def cost_lines(run: Run) -> list[str]:
    """What training and evaluating took, over all candidates."""
    candidates = run.candidates()
    trainings = [c.training for c in candidates if c.training and c.genome.operator != "blend"]
    train_s = sum(training.train_seconds for training in trainings)
    tokens = sum(training.train_tokens for training in trainings)
    eval_s = sum(c.score.eval_seconds for c in candidates if c.score)
    if not trainings and not run.results():
        return ["nothing has been trained yet"]
    lines = [
        f"training: {words.counted(len(trainings), 'candidate')} in {words.duration(train_s)}, {tokens:,} tokens",
        f"scoring them: {words.duration(eval_s)}",
    ]
    failed = sum(c.state == "failed" for c in candidates)
    if failed:
        lines.append(f"failed: {words.counted(failed, 'candidate')}, see the family tree")
    if results := run.results():
        wall = words.duration(sum(result.seconds for result in results))
        lines.append(f"{words.counted(len(results), 'generation')} in {wall}")
    return lines


def _places(run: Run, report: Path | None, store: str | None) -> list[str]:
    lines = []
    if report:
        lines.append(f"{'report':<22}{_near(report)}")
    notebooks = [run.generation_folder(g) / "notebook.ipynb" for g in range(run.settings.population.generations)]
    written = [path for path in notebooks if path.exists()]
    if written:
        lines.append(f"{'executed notebooks':<22}{_near(written[0])}" + (" …" if len(written) > 1 else ""))
    if store:
        lines.append(f"{'MLflow store':<22}{store}")
    lines.append(f"{'everything else':<22}{_near(run.folder)}")
    return lines


def _near(path: Path) -> str:
    """A path as short as it can be typed here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def _sentences(lines: list[str]) -> list[str]:
    return [f"{line[0].upper()}{line[1:]}." for line in lines]


def _block(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])
