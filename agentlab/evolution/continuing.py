"""The line that goes on: where trainings ended, kept on disk for the generation that continues one of them."""

from collections.abc import Callable

from agentlab.errors import AdapterError
from agentlab.events import Event, Warned
from agentlab.evolution.run import Run
from agentlab.evolution.selection import Ranked, to_continue
from agentlab.learning.state import TrainingState
from agentlab.records import GenerationResult, Genome


def keeper(run: Run, genome: Genome) -> Callable[[TrainingState], None] | None:
    """What writes down where this candidate's training ended; None where no later generation may continue it."""
    population = run.settings.population
    several = population.size - population.elites > 1  # an only child is crossed or mutated
    later = genome.generation < population.generations - 1
    if not (several and later and run.settings.training.average):  # at a rate that fell to zero nothing goes on
        return None
    path = run.training_state_file(genome.candidate)
    return lambda state: state.save(path)


def beginning(run: Run, genome: Genome, emit: Callable[[Event], None]) -> TrainingState | None:
    """Where a continuation goes on; None for other candidates, and with a warning where it is missing or damaged."""
    if genome.operator != "continuation" or not run.settings.training.average:
        return None
    path = run.training_state_file(genome.parents[0])
    try:
        return TrainingState.load(path)
    except (AdapterError, OSError) as error:
        reason = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
        emit(Warned(message=f"{genome.candidate} begins at its parent's weights without Adam's moments: {reason}"))
        return None


def forget(run: Run, result: GenerationResult) -> None:
    """Delete where trainings ended up to this generation, but for the one that the next generation continues."""
    known = [candidate for adapter in result.pool if (candidate := run.candidate(adapter)) and candidate.score]
    keep = None
    if known and result.generation < run.settings.population.generations - 1:
        keep = to_continue([Ranked(one.genome.candidate, one.fitness, one.genome) for one in known]).adapter
    run.forget_training_states(result.generation, keep)
