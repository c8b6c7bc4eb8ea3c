"""Promotion: the generation's best by fitness against the champion, on items that did not choose it."""

from agentlab.config import Settings
from agentlab.evolution.stats import detectable_gain, paired_p_value, wins_and_losses
from agentlab.records import Score, Verdict

FEW_ITEMS = 100  # below this a gain of ten points is missed more often than not


def decide(settings: Settings, generation: int, challenger: Score, incumbent: Score) -> Verdict:
    """The verdict of an exact paired test at alpha / planned generations, so that the whole run errs with alpha."""
    alpha = settings.gate.alpha / settings.population.generations
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
