"""What follows from a generation's result: weights that go, and states of candidates. Needs no model."""

import contextlib

from agentlab.adapters import Pool
from agentlab.errors import AdapterError
from agentlab.evolution.breeding import to_continue
from agentlab.evolution.run import Run
from agentlab.evolution.selection import Ranked
from agentlab.records import GenerationResult


def tidy(run: Run, result: GenerationResult) -> None:
    """Make weights, cards and candidate records follow the result; safe to repeat after a kill in the middle.

    What a person has pruned since stays pruned. Of the kept ends of trainings only the fittest's stays, for the one
    that continues it.
    """
    run.forget_training_states(result.generation, keep=_continued(run, result))
    on_disk = Pool(run.folder / "adapters")
    for adapter in result.culled:
        with contextlib.suppress(AdapterError):  # its card is gone or damaged: nobody needs it any more
            on_disk.cull(adapter)
    gone = {card.adapter_id for card in on_disk.cards(strict=False) if card.weights is None}
    for adapter in [*result.pool, *result.culled]:
        candidate = run.candidate(adapter)
        state = "culled" if adapter in result.culled or adapter in gone else "kept"
        if candidate is not None and candidate.state != state:
            run.save_candidate(candidate.model_copy(update={"state": state}))


def _continued(run: Run, result: GenerationResult) -> str | None:
    """Whose training the next generation continues; None where there is no next one."""
    known = [candidate for adapter in result.pool if (candidate := run.candidate(adapter)) and candidate.score]
    if result.generation == run.settings.population.generations - 1 or not known:
        return None
    return to_continue([Ranked(one.genome.candidate, one.fitness, one.genome) for one in known]).adapter
