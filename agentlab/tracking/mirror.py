"""One run's MLflow side as a whole: what to bring up to date, in which order. Raises what the store raises."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab import config
from agentlab.evolution.run import Run, generation_of
from agentlab.records import Candidate, SealedResult
from agentlab.tracking import artifacts, store, views
from agentlab.tracking.models import ModelShelf
from agentlab.tracking.runs import Found, RunShelf, experiment_of
from agentlab.tracking.timeline import Status, Timeline
from agentlab.tracking.views import RunView, SuiteInfo

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Mirror:
    """MLflow's picture of a run's folder. Its methods are called under the store's lock."""

    def __init__(self, run: Run, suite: SuiteInfo) -> None:
        self._run = run
        self._client: MlflowClient = store.configure(run.root)
        experiment_id = experiment_of(self._client, run.root, run.settings.name)
        self._runs = RunShelf(self._client, run, experiment_id, suite)
        self._models = ModelShelf(self._client, run, experiment_id)

    def reconcile(self, timeline: Timeline) -> None:
        """Everything, from nothing if need be."""
        run = self._run
        runs, models = self._runs.find(), self._models.find()
        results, candidates = run.results(), run.candidates()
        fitness = {value.genome.candidate: value.fitness for value in candidates if _has_fitness(value)}
        self._apply_evolution(views.evolution(run, timeline, results, fitness, run.sealed()), runs)
        for index in range(run.settings.population.generations):
            if run.population(index) is not None or f"generation-{index}" in timeline.spans:
                view = views.generation(run, timeline, index, run.result(index), fitness)
                self._runs.apply(view, runs)
                artifacts.publish_folder(self._client, runs[view.key], run.generation_folder(index))
        for candidate in candidates:
            self._apply_candidate(timeline, candidate, runs)
            self._models.apply(candidate, runs, models)
        self._models.register(results, runs, models)

    def update(self, timeline: Timeline, adapters: Iterable[str]) -> list[str]:
        """These candidates, as far as they are on disk and their generation's run exists; those that have a score."""
        models = None
        scored = []
        runs: dict[int, Found] = {}
        for adapter in adapters:
            generation = generation_of(adapter)
            candidate = self._run.candidate(adapter)
            found = runs[generation] if generation in runs else self._runs.find(generation)
            runs[generation] = found
            if candidate is None or f"generation-{generation}" not in found:
                continue
            self._apply_candidate(timeline, candidate, found)
            if candidate.score is not None:
                models = self._models.find() if models is None else models
                self._models.apply(candidate, found, models)
                scored.append(adapter)
        return scored

    def seal(self, timeline: Timeline, result: SealedResult) -> None:
        """The sealed comparison on the evolution's run."""
        self._apply_evolution(views.evolution(self._run, timeline, self._run.results(), {}, result), self._runs.find())

    def _apply_evolution(self, view: RunView, runs: Found) -> None:
        self._runs.apply(view, runs)
        info = runs["evolution"].info
        if not (artifacts.local_path(info.artifact_uri) / "config.yaml").exists():
            self._client.log_text(info.run_id, config.dump(self._run.settings), "config.yaml")

    def _apply_candidate(self, timeline: Timeline, candidate: Candidate, runs: Found) -> None:
        finished = self._run.result(candidate.genome.generation) is not None
        self._runs.apply(views.candidate(self._run, timeline, candidate, finished), runs)

    def run_id(self, key: str) -> str | None:
        """Id of the MLflow run with that key: "evolution", "generation-2" or an adapter id."""
        found = self._runs.find().get(key)
        return None if found is None else str(found.info.run_id)

    def set_status(self, key: str, status: Status) -> None:
        found = self._runs.find().get(key)
        if found is not None and found.info.status != status:
            self._runs.set_status(found.info.run_id, status)

    def interrupt(self, generation: int | None, status: Status, traceback: str) -> None:
        """Mark the evolution, the generation and its open candidates; keep the traceback with the generation."""
        runs = self._runs.find()
        over = [key for key in runs if generation is not None and self._is_open(key, generation)]
        for key in ["evolution", *over]:
            if key in runs and runs[key].info.status not in (status, "FINISHED"):
                self._runs.set_status(runs[key].info.run_id, status)
        current = runs.get(f"generation-{generation}")
        if traceback.strip() and current is not None:
            last_line = traceback.strip().splitlines()[-1]
            self._client.set_tag(current.info.run_id, "agentlab.error", last_line, synchronous=True)
            self._client.log_text(current.info.run_id, traceback, "traceback.txt")

    def _is_open(self, key: str, generation: int) -> bool:
        if key == f"generation-{generation}":
            return self._run.result(generation) is None
        if key == "evolution" or key.startswith("generation-") or generation_of(key) != generation:
            return False
        candidate = self._run.candidate(key)
        return candidate is None or candidate.state in ("bred", "trained")

    def publish(self, generation: int, files: Iterable[Path | None], figures: Mapping[str, Any]) -> None:
        """Files and figures into the generation's run."""
        current = self._runs.find(generation).get(f"generation-{generation}")
        if current is None:
            return
        for file in files:
            if file is not None:
                artifacts.publish(self._client, current, [file], file.parent)
        artifacts.publish_figures(self._client, current, figures)


def _has_fitness(candidate: Candidate) -> bool:
    return candidate.score is not None and candidate.score.fitness is not None
