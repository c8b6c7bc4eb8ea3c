import numpy as np
import pytest

from agentlab import config
from agentlab.evolution.breeding import founder
from agentlab.evolution.gate import decide, hopeless, level
from agentlab.evolution.generation import _challenger
from agentlab.evolution.stats import mean_interval, paired_p_value
from agentlab.records import Candidate, Score


def score_of(adapter, values):
    mean, low, high = mean_interval(values)
    return Score(
        adapter=adapter,
        split="gate",
        suite="s",
        engine="transformers",
        item_scores=list(values),
        answers=[""] * len(values),
        prompt_tokens=[1] * len(values),
        completion_tokens=[1] * len(values),
        accuracy=mean,
        accuracy_ci_low=low,
        accuracy_ci_high=high,
        latency_estimated_s=0.1,
    )


def settings_of(generations=3, alpha=0.05):
    values = {"name": "x", "population": {"generations": generations}, "gate": {"alpha": alpha}}
    return config.from_mapping(values, "test")


def outcome(wins, losses, items, **changes):
    challenger = [1.0] * wins + [0.0] * losses + [1.0] * (items - wins - losses)
    incumbent = [0.0] * wins + [1.0] * losses + [1.0] * (items - wins - losses)
    return decide(settings_of(**changes), 0, score_of("g001-c00", challenger), score_of("g000-c01", incumbent))


def test_alpha_is_split_over_the_planned_generations():
    # p(5 of 5) = 1/32 = 0.031: enough for a run of one generation, not for a share of two
    assert outcome(5, 0, 100, generations=1).passed
    assert not outcome(5, 0, 100, generations=2).passed
    assert outcome(5, 0, 100, generations=4).alpha == pytest.approx(0.0125)


def test_a_promotion_hands_its_level_on_and_a_refusal_spends_it():
    settings = settings_of(generations=5)
    verdicts = [
        outcome(30, 0, 100).model_copy(update={"generation": 0}),  # passed
        # generation 1 had nobody to test
        outcome(2, 3, 100).model_copy(update={"generation": 2}),  # refused
        outcome(30, 0, 100).model_copy(update={"generation": 3}),
    ]
    assert [round(level(settings, k, verdicts), 9) for k in range(5)] == [0.01, 0.02, 0.03, 0.01, 0.02]


def test_verdict_holds_what_was_counted():
    verdict = outcome(12, 3, 100)
    assert (verdict.wins, verdict.losses, verdict.items, verdict.generation) == (12, 3, 100, 0)
    assert verdict.p_value == paired_p_value(12, 3)
    assert verdict.challenger_accuracy - verdict.incumbent_accuracy == pytest.approx(0.09)
    assert (verdict.challenger, verdict.incumbent) == ("g001-c00", "g000-c01")


def test_detectable_gain_would_just_have_passed():
    verdict = outcome(9, 4, 100)
    assert not verdict.passed
    needed = round(verdict.detectable_gain * 100) + 4
    assert outcome(needed, 4, 100).passed
    assert not outcome(needed - 1, 4, 100).passed


def half(right, items=64):
    return [1.0] * right + [0.0] * (items - right)


def test_who_loses_clearly_on_the_fitness_items_is_hopeless():
    champion = score_of("g000-c01", half(62))
    assert not hopeless(score_of("g001-c00", half(62)), champion)
    assert not hopeless(score_of("g001-c00", half(58)), champion)  # four lost, none won: p = 0.0625
    assert hopeless(score_of("g001-c00", half(57)), champion)
    assert not hopeless(score_of("g001-c00", half(64)), champion)


class Records:
    """What `_challenger` reads of a run."""

    def __init__(self, verdicts=(), **right):
        self._scores = {name.replace("_", "-"): score_of(name.replace("_", "-"), half(n)) for name, n in right.items()}
        self._verdicts = list(verdicts)

    def verdicts(self):
        return self._verdicts

    def score(self, adapter, split):
        assert split == "fitness"
        return self._scores[adapter]

    def kept_candidate(self, name):
        return self.candidate(name)

    def candidate(self, name):
        assert name != "base"
        score = self._scores[name].model_copy(update={"fitness": self._scores[name].accuracy})
        genome = founder(settings_of(), 0, 0, 3).model_copy(update={"candidate": name})
        return Candidate(genome=genome, state="evaluated", score=score)


def test_a_lucky_champion_is_challenged_by_who_comes_after_it():
    run = Records(g001_c01=62, g002_c00=59, g002_c02=60, base=1)
    members = ["g001-c01", "g002-c00", "g002-c02"]
    assert _challenger(run, members, "g001-c01") == "g002-c02"
    assert _challenger(run, members, "base") == "g001-c01"
    assert _challenger(run, ["g001-c01"], "g001-c01") is None
    assert _challenger(Records(g001_c01=62, g002_c00=30, base=1), ["g001-c01", "g002-c00"], "g001-c01") is None


def test_who_has_lost_to_this_champion_does_not_challenge_it_again():
    lost = outcome(2, 3, 100).model_copy(update={"challenger": "g002-c02", "incumbent": "g001-c01"})
    elsewhere = outcome(2, 3, 100).model_copy(update={"challenger": "g002-c00", "incumbent": "g000-c00"})
    run = Records([lost, elsewhere], g001_c01=62, g002_c00=59, g002_c02=60, base=1)
    assert _challenger(run, ["g001-c01", "g002-c00", "g002-c02"], "g001-c01") == "g002-c00"


def test_sentence_holds_the_numbers():
    assert outcome(12, 3, 100, generations=1).verdict == (
        "g001-c00 passes the gate against g000-c01: 12 items won, 3 lost of 100 (p = 0.018, needed ≤ 0.05); "
        "with that many losses a gain of 7 points was the smallest that could pass"
    )
    assert "does not pass the gate against g000-c01: 2 items won, 3 lost" in outcome(2, 3, 100).verdict


def test_sentence_says_when_nothing_could_have_passed():
    verdict = outcome(4, 16, 20)
    assert not verdict.passed
    assert verdict.verdict.endswith("with that many losses no gain could have passed")
    assert "no gain could have passed" in outcome(1, 0, 3).verdict  # three items decide nothing at 0.017


def test_a_model_never_passes_against_itself():
    assert not outcome(0, 0, 100, alpha=0.99, generations=1).passed


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("first_is_better", [False, True])
def test_equal_models_are_promoted_at_most_as_often_as_alpha_says(graded, first_is_better):
    """Whole runs of three generations of equal models, at an alpha large enough to measure.

    Also when the first generation really is better, and so hands its level on.
    """
    rng = np.random.default_rng(1)
    settings = settings_of(generations=3, alpha=0.2)
    runs, promoted = 400, 0
    for _ in range(runs):
        skill = rng.random(100)
        verdicts = []
        for generation in range(3):
            if first_is_better and generation == 0:
                verdicts.append(outcome(60, 0, 100, generations=3, alpha=0.2))
                continue
            scores = [
                np.clip(skill + rng.normal(0, 0.2, 100), 0, 1) if graded else (rng.random(100) < skill).astype(float)
                for _ in range(2)
            ]
            verdict = decide(
                settings, generation, score_of("g001-c00", scores[0]), score_of("base", scores[1]), verdicts
            )
            verdicts.append(verdict)
            if verdict.passed:
                promoted += 1
                break
    assert promoted / runs <= 0.2 + 2 * (0.2 * 0.8 / runs) ** 0.5
    assert promoted / runs > 0.05  # and the test is not asleep
