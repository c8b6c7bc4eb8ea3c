"""Promotion: the generation's best beside the champion against it, on items that did not choose either."""

from collections.abc import Sequence

from agentlab.config import Settings
from agentlab.evolution.stats import detectable_gain, paired_p_value, wins_and_losses
from agentlab.records import Score, Verdict

# Chance of losing so clearly on the fitness items for one that is as good as an incumbent that was not chosen by them;
# this one was, so it is a little more.
HOPELESS = 0.05
FEW_ITEMS = 100  # below this a gain of ten points is missed more often than not


def level(settings: Settings, generation: int, earlier: Sequence[Verdict]) -> float:
    """The level to test at in this generation: its share of alpha, and what the generations just before handed on.

    The fallback procedure (Wiens 2003): every planned generation has alpha / generations; one that promoted, or had
    nobody to test, hands its level on, one that refused has spent it. So the whole run errs with at most alpha, and a
    clear first step, which the base model makes easy, does not cost the later and smaller ones their power.
    """
    share = settings.gate.alpha / settings.population.generations
    refused = [verdict.generation for verdict in earlier if verdict.generation < generation and not verdict.passed]
    return share * (generation - max(refused, default=-1))


def hopeless(challenger: Score, incumbent: Score) -> bool:
    """Whether the challenger loses on the fitness items already; then the gate's level is kept for the next one."""
    wins, losses = wins_and_losses(challenger.item_scores, incumbent.item_scores)
    return paired_p_value(losses, wins) <= HOPELESS


def decide(
    settings: Settings, generation: int, challenger: Score, incumbent: Score, earlier: Sequence[Verdict] = ()
) -> Verdict:
    """The verdict of an exact paired test; `earlier` are the run's verdicts so far, which decide its level."""
    alpha = level(settings, generation, earlier)
    wins, losses = wins_and_losses(challenger.item_scores, incumbent.item_scores)
    items = len(challenger.item_scores)
    p_value = paired_p_value(wins, losses)
    passed = p_value <= alpha
    smallest = detectable_gain(items, losses, alpha)
    least = "no gain could have passed"
    if paired_p_value(items - losses, losses) <= alpha:
        least = f"a gain of {100 * smallest:.0f} points was the smallest that could pass"
    sentence = (
        f"{challenger.adapter} {'passes' if passed else 'does not pass'} the gate against {incumbent.adapter}: "
        f"{wins} items won, {losses} lost of {items} (p = {p_value:.2g}, needed ≤ {alpha:.2g}); "
        f"with that many losses {least}"
    )
    return Verdict(
        generation=generation,
        challenger=challenger.adapter,
        incumbent=incumbent.adapter,
        wins=wins,
        losses=losses,
        items=items,
        challenger_accuracy=challenger.accuracy,
        incumbent_accuracy=incumbent.accuracy,
        p_value=p_value,
        alpha=alpha,
        detectable_gain=smallest,
        passed=passed,
        verdict=sentence,
    )
