"""How far a run is and how long it will take, folded from its events alone."""

import dataclasses
from collections.abc import Callable

from agentlab import events
from agentlab.config import Settings
from agentlab.events import Event
from agentlab.evolution.run import generation_of
from agentlab.records import BASE
from agentlab.report.describe import model_name
from agentlab.report.pace import Pace

# Until a split has been seen, the least that a suite must have.
LEAST_ITEMS = {"fitness": 32, "gate": 100, "test": 200}


@dataclasses.dataclass
class Row:
    """What is known about one candidate; accuracy and its 95 % interval are on the fitness split."""

    candidate: str
    generation: int
    operator: str = ""
    parents: tuple[str, ...] = ()
    state: str = "bred"
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    remedies: int = 0
    accuracy: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    fitness: float | None = None

    @property
    def trained(self) -> bool:
        return self.state not in ("bred", "training")

    @property
    def settled(self) -> bool:
        """Nothing is left to do for it: it has a score or it failed."""
        return self.state in ("evaluated", "kept", "culled", "failed")


class Progress:
    """State for a display. Feed it the run's earlier events too, so that finished work is not counted again.

    `elites`: how many of each later generation are not trained anew (`population.elites`). `share_of_steps`: how many
    steps a candidate of a generation trains in the mean, in any unit.
    """

    def __init__(self, *, elites: int = 0, share_of_steps: Callable[[int], float] = lambda generation: 1.0) -> None:
        self.elites = elites
        self._share_of_steps = share_of_steps
        self.run = ""
        self.generations: int | None = None
        self.population: int | None = None
        self.generation: int | None = None
        self.champion = BASE
        self.candidates: dict[str, Row] = {}
        self.ended = False  # finished, failed or stopped: nothing more will come from this process
        self._finished = False
        self._stage = "starting"
        self._calibrated = False
        self._whole_run = False  # a launcher runs it: the sealed test follows
        self._first = 0
        self._begun: set[int] = set()
        self._done: set[int] = set()
        self._gated: set[int] = set()
        self._gate_answers: dict[int, dict[str, int]] = {}  # generation → challenger, who may be an elite → items
        self._items = dict(LEAST_ITEMS)
        self._answered: dict[tuple[str, str], int] = {}
        self._pace = Pace()
        self._fraction: float | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Progress":
        """For a run with these settings."""
        from agentlab.evolution.breeding import share_of_steps  # imports numpy, which help texts do without

        return cls(
            elites=settings.population.elites,
            share_of_steps=lambda generation: share_of_steps(settings, generation),
        )

    def update(self, event: Event) -> None:
        """Take in the next event."""
        # between a stop, a failure or a kill and what follows, nobody was working
        resumed = isinstance(event, events.EvolutionStarted) or (
            isinstance(event, events.GenerationStarted) and (event.continued or self.ended)
        )
        self._pace.clock(event, resumed)
        self._fold(event)
        self._fraction = self._measure()

    def stage(self) -> str:
        """What is happening now, in a few words."""
        return self._stage

    def fraction(self) -> float | None:
        """Share of the run's time that is behind us, in [0, 1], never falling; None before anything was measured."""
        return self._fraction

    def eta_s(self) -> float | None:
        """Seconds of work left at the measured speeds; None before they are known or when nothing more will come."""
        if self._finished:
            return 0.0
        return None if self.ended else self._remaining_s()

    def elapsed_s(self) -> float:
        """Seconds of work so far, pauses between continuations left out."""
        return self._pace.elapsed_s()

    def rows(self, generation: int | None = None) -> list[Row]:
        """The candidates bred in a generation (default: the present one), in breeding order."""
        wanted = self.generation if generation is None else generation
        return sorted((r for r in self.candidates.values() if r.generation == wanted), key=lambda r: r.candidate)

    def current(self) -> Row | None:
        """The candidate in training, if one is."""
        return next((row for row in self.candidates.values() if row.state == "training"), None)

    # -- folding ------------------------------------------------------------------------------------------------

    def _fold(self, event: Event) -> None:  # noqa: PLR0912 - one case per kind of event
        match event:
            case events.EvolutionStarted():
                self.run, self.generations, self.population = event.run, event.generations, event.population
                self._whole_run, self.ended, self._stage = True, False, "starting"
            case events.GenerationStarted():
                self._begin(event.generation)
            case events.ModelLoading() | events.ModelLoaded() | events.Calibrated():
                self._loading(event)
            case events.Bred():
                self._bred(event)
            case events.TrainingStarted():
                row = self._row(event.candidate)
                row.state, row.step, row.steps, row.loss = "training", 0, event.steps, None
                self._stage = f"training {event.candidate}"
            case events.TrainingStep():
                row = self._row(event.candidate)
                self._pace.units["training"] += max(1, event.step - row.step)
                row.state, row.step, row.steps, row.loss = "training", event.step, event.steps, event.loss
                self._stage = f"training {event.candidate}, step {event.step} of {event.steps}"
            case events.RemedyApplied():
                row = self._row(event.candidate)
                row.remedies, row.step = row.remedies + 1, 0
            case events.Trained():
                self._row(event.candidate).state = "trained"
            case events.EvaluationProgress() | events.Evaluated():
                self._evaluation(event)
            case events.CandidateFailed():
                self._row(event.candidate).state = "failed"
            case events.Selected():
                self._selected(event)
            case events.GateDecided():
                self._gated.add(event.generation)
                self._stage = "gate decided"
            case events.Promoted():
                self.champion = event.adapter
            case events.GenerationFinished():
                self._done.add(event.generation)
                self.champion, self._stage = event.champion, f"generation {event.generation} finished"
                self._finished = self.ended = not self._whole_run
            case events.Waiting():
                self._stage = f"waiting: {event.reason}"
            case events.SealOpened():
                self._stage = "answering the sealed test"
            case events.EvolutionFinished():
                self.ended = self._finished = True
                self.champion, self._stage = event.champion, "finished"
            case events.GenerationFailed() | events.Stopped():
                self.ended = True
                self._stage = "stopped" if isinstance(event, events.Stopped) else "failed"

    def _begin(self, generation: int) -> None:
        if not self._whole_run:
            self._first, self.generations = generation, generation + 1
        self.generation, self.ended, self._finished = generation, False, False
        self._pace.units["overhead"] += 1
        self._begun.add(generation)
        self._done.update(range(generation))
        for row in self.rows(generation):
            if row.state == "training":  # killed in the middle: it is trained again from its first step
                row.state, row.step = "bred", 0
        self._stage = f"generation {generation}: loading the model"

    def _loading(self, event: events.ModelLoading | events.ModelLoaded | events.Calibrated) -> None:
        match event:
            case events.ModelLoading():
                self._stage = f"loading {event.model}" if event.engine != "vllm" else f"starting vLLM for {event.model}"
            case events.ModelLoaded():
                self._stage = "model loaded" if self._calibrated else "model loaded, measuring its speed"
            case events.Calibrated():
                self._calibrated = True

    def _bred(self, event: events.Bred) -> None:
        row = self._row(event.candidate)
        row.operator, row.parents = event.operator, tuple(event.parents)
        steps = event.genome.get("steps")
        if row.steps is None and isinstance(steps, int):
            row.steps = steps
        self._stage = f"breeding generation {event.generation}"

    def _evaluation(self, event: events.EvaluationProgress | events.Evaluated) -> None:
        key = (event.candidate, event.split)
        before = self._answered.get(key, 0)
        if isinstance(event, events.EvaluationProgress):
            done, total = min(event.done, event.total), event.total
            self._stage = f"{model_name(event.candidate)} answers {event.split}, {done} of {total} items"
        else:
            done = total = event.items
            self._stage = f"{model_name(event.candidate)} answered {event.split}"
        self._items[event.split] = max(1, total)
        self._answered[key] = done
        if event.split == "gate" and event.candidate != BASE and self.generation is not None:
            self._gate_answers.setdefault(self.generation, {})[event.candidate] = done
        self._pace.units["evaluation"] += max(0, done - before) if done >= before else done
        if isinstance(event, events.Evaluated) and event.candidate != BASE and event.split == "fitness":
            row = self._row(event.candidate)
            row.state, row.accuracy, row.fitness = "evaluated", event.accuracy, event.fitness
            row.ci_low, row.ci_high = event.accuracy_ci_low, event.accuracy_ci_high

    def _selected(self, event: events.Selected) -> None:
        for row in self.candidates.values():
            if row.candidate in event.pool:
                row.state = "kept"
            elif row.candidate in event.culled:
                row.state = "culled"
            elif row.generation == event.generation and row.state != "failed":
                row.state = "evaluated"
        self._gated.add(event.generation)  # the gate comes before; an old champion on top needs none
        self._stage = f"generation {event.generation}: survivors selected"

    def _row(self, candidate: str) -> Row:
        try:
            generation = generation_of(candidate)
        except ValueError:
            generation = self.generation or 0
        return self.candidates.setdefault(candidate, Row(candidate, generation))

    # -- measuring ----------------------------------------------------------------------------------------------

    def _measure(self) -> float | None:
        if self._finished:
            return 1.0
        left = self._remaining_s()
        spent = self.elapsed_s()
        if left is None or spent + left <= 0:
            return self._fraction
        return max(self._fraction or 0.0, min(1.0, spent / (spent + left)))

    def _remaining_s(self) -> float | None:
        """Remaining steps, items and generation starts at their measured pace; None while a pace is unknown."""
        if self.generations is None:
            return None
        todo = [g for g in range(self._first, self.generations) if g not in self._done]
        return self._pace.cost_s(
            {
                "training": sum(self._steps_left(generation) for generation in todo),
                "evaluation": self._items_left(todo),
                "overhead": len([g for g in todo if g not in self._begun]),
            }
        )

    def _unknown(self, generation: int) -> int:
        """How many candidates of a generation are still to be bred."""
        known = self.rows(generation)
        if self.population is None or any(row.state != "bred" for row in known):
            return 0
        expected = self.population - (self.elites if generation > 0 else 0)
        return max(0, expected - len(known))

    def _steps_left(self, generation: int) -> float:
        told = [(row.steps, self._share_of_steps(generation_of(row.candidate)))
                for row in self.candidates.values() if row.steps]  # a blend has none  # fmt: skip
        unit = sum(steps for steps, _ in told) / sum(share for _, share in told) if told else 1.0
        typical = unit * self._share_of_steps(generation)
        rows = self.rows(generation)
        known = sum(
            max(0.0, (typical if row.steps is None else row.steps) - row.step) for row in rows if not row.trained
        )
        return known + self._unknown(generation) * typical

    def _items_left(self, todo: list[int]) -> float:
        left = 0.0
        for generation in todo:
            rows = self.rows(generation)
            left += sum(self._unanswered(r.candidate, "fitness") for r in rows if not r.settled)
            left += self._unknown(generation) * self._items["fitness"]
            if generation not in self._gated:
                asked = sum(self._gate_answers.get(generation, {}).values())
                left += max(0, self._items["gate"] - asked)
        if self._whole_run and todo:  # the last generation ends with the sealed test
            first = 0 in todo
            left += self._unanswered(BASE, "fitness") + self._unanswered(BASE, "gate") if first else 0
            sealed = sum(done for (_, split), done in self._answered.items() if split == "test")
            left += max(0, 2 * self._items["test"] - sealed)
        return left

    def _unanswered(self, model: str, split: str) -> int:
        return max(0, self._items[split] - self._answered.get((model, split), 0))
