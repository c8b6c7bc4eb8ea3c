"""The line that goes on: where trainings ended, kept on disk for the generation that continues one of them."""

from collections.abc import Callable, Iterable

from agentlab.adapters import Pool
from agentlab.errors import AdapterError, StorageError
from agentlab.events import Event, Warned
from agentlab.evolution.run import Run
from agentlab.evolution.selection import Ranked, to_continue
from agentlab.learning.state import TrainingState
from agentlab.records import GenerationResult, Genome


def keeper(run: Run, genome: Genome, emit: Callable[[Event], None]) -> Callable[[TrainingState], None] | None:
    """What writes down where this candidate's training ended; None where no later generation may continue it.

    Where the disk does not take it, a warning: the adapter, which counts, is still to be saved.
    """
    if not run.settings.continues or genome.generation == run.settings.population.generations - 1:
        return None
    path = run.training_state_file(genome.candidate)

    def keep(state: TrainingState) -> None:
        try:
            state.save(path)
        except (StorageError, OSError) as error:
            emit(Warned(message=f"where the training of {genome.candidate} ended is not kept: {error}"))

    return keep


def beginning(run: Run, genome: Genome, emit: Callable[[Event], None]) -> TrainingState | None:
    """Where a continuation goes on; None for other candidates, and with a warning where it is missing or damaged."""
    if genome.operator != "continuation" or not run.settings.training.average:
        return None
    path = run.training_state_file(genome.parents[0])
    try:
        state = TrainingState.load(path)
    except (AdapterError, OSError) as error:
        reason = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
        emit(Warned(message=f"{genome.candidate} begins at its parent's weights without Adam's moments: {reason}"))
        return None
    if state.learning_rate < genome.learning_rate:
        rates = f"{state.learning_rate:.2g} instead of {genome.learning_rate:.2g}"
        emit(Warned(message=f"{genome.candidate} goes on at a learning rate of {rates}: a remedy had lowered it"))
    return state


def forget(run: Run, result: GenerationResult, pool: Pool) -> None:
    """Delete where trainings ended up to this generation, but for the one that the next generation continues."""
    known = [candidate for adapter in result.pool if (candidate := run.candidate(adapter)) and candidate.score]
    members = [Ranked(one.genome.candidate, one.fitness, one.genome) for one in known]
    more = result.generation < run.settings.population.generations - 1
    line = to_continue(able(pool, members)) if more else None
    run.forget_training_states(result.generation, None if line is None else line.adapter)


def able(pool: Pool, members: Iterable[Ranked], emit: Callable[[Event], None] = lambda event: None) -> list[Ranked]:
    """Those whose weights are still there and whole; the others are warned about, and have no children."""
    found = []
    for member in members:
        try:
            pool.verify(member.adapter)
        except AdapterError as error:
            emit(Warned(message=f"{member.adapter} becomes no parent: {error}"))
        else:
            found.append(member)
    return found
