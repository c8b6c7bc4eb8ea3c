"""What follows from a generation's result: weights that go, and states of candidates. Needs no model."""

import contextlib

from agentlab.adapters import Pool
from agentlab.errors import AdapterError
from agentlab.evolution import continuing
from agentlab.evolution.run import Run
from agentlab.records import GenerationResult


def tidy(run: Run, result: GenerationResult) -> None:
    """Make weights, cards and candidate records follow the result; safe to repeat after a kill in the middle.

    What a person has pruned since stays pruned.
    """
    on_disk = Pool(run.folder / "adapters")
    continuing.forget(run, result, on_disk)
    for adapter in result.culled:
        with contextlib.suppress(AdapterError):  # its card is gone or damaged: nobody needs it any more
            on_disk.cull(adapter)
    gone = {card.adapter_id for card in on_disk.cards(strict=False) if card.weights is None}
    for adapter in [*result.pool, *result.culled]:
        candidate = run.candidate(adapter)
        state = "culled" if adapter in result.culled or adapter in gone else "kept"
        if candidate is not None and candidate.state != state:
            run.save_candidate(candidate.model_copy(update={"state": state}))
