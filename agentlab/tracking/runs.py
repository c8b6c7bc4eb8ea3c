"""Bring MLflow runs in line with their views: found by tags, created once, changed only where they differ."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentlab.evolution.run import Run
from agentlab.tracking import store
from agentlab.tracking.timeline import TERMINAL
from agentlab.tracking.views import RunView, SuiteInfo, key_of, same

if TYPE_CHECKING:
    from mlflow import MlflowClient

Found = dict[str, Any]  # key of a view → mlflow.entities.Run
_PARENT = "mlflow.parentRunId"


def experiment_of(client: "MlflowClient", root: Path, name: str) -> str:
    """Id of the MLflow experiment of that name, created or restored if need be."""
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=str(store.folder(root) / name)))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


class RunShelf:
    """The MLflow runs of one evolution run. Its methods are called under the store's lock."""

    def __init__(self, client: "MlflowClient", run: Run, experiment_id: str, suite: SuiteInfo) -> None:
        self._client = client
        self._run = run
        self._experiment_id = experiment_id
        self._suite = suite

    def find(self, generation: int | None = None) -> Found:
        """All runs, or those of one generation, by key. Of duplicates the oldest stays, the others are deleted."""
        where = f"tags.`agentlab.run` = '{self._run.id}'"
        if generation is not None:
            where += f" AND tags.`agentlab.generation` = '{generation}'"
        runs: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs([self._experiment_id], where, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                break
        found: Found = {}
        for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)):
            key = key_of(run.data.tags)
            if key in found:
                self._client.delete_run(run.info.run_id)
            elif key:
                found[key] = run
        return found

    def apply(self, view: RunView, found: Found) -> str:
        """Make one run like its view and return its id; its parent must have been applied before, or be in `found`."""
        from mlflow.entities import RunTag

        tags = dict(view.tags)
        if view.parent is not None:
            tags[_PARENT] = found[view.parent].info.run_id
        run = found.get(view.key)
        if run is not None and any(run.data.params.get(key, value) != value for key, value in view.params.items()):
            # Params cannot change: that run shows a candidate that is no longer on disk.
            self._client.delete_run(run.info.run_id)
            run = None
        if run is None:
            run = self._client.create_run(
                self._experiment_id,
                start_time=view.span.started_ms if view.span else None,
                tags=tags,  # with the run, so that a kill leaves no run that nobody finds
                run_name=view.name,
            )
            found[view.key] = run
        run_id = str(run.info.run_id)
        changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        missing = self._missing_params(view, run)
        metrics = self._missing_metrics(view, run)
        if changed or missing or metrics:
            self._client.log_batch(run_id, metrics=metrics, params=missing, tags=changed, synchronous=True)
        self._log_datasets(view, run)
        self._apply_status(view, run)
        return run_id

    @staticmethod
    def _missing_params(view: RunView, run: Any) -> list[Any]:
        from mlflow.entities import Param

        return [Param(key, value) for key, value in view.params.items() if key not in run.data.params]

    def _missing_metrics(self, view: RunView, run: Any) -> list[Any]:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        known = run.data.metrics
        metrics = [
            Metric(key, value, now_ms, 0) for key, value in view.metrics.items() if not same(known.get(key), value)
        ]
        for key, curve in view.curves.items():
            finished = run.info.status == view.status == "FINISHED"  # set after the curve, so it vouches for it
            if not curve or (finished and same(known.get(key), curve[max(curve)])):
                continue
            points = self._client.get_metric_history(run.info.run_id, key) if key in known else []
            steps = {point.step for point in points}
            metrics += [Metric(key, value, now_ms, step) for step, value in curve.items() if step not in steps]
        return metrics

    def _log_datasets(self, view: RunView, run: Any) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = {value.dataset.name for value in run.inputs.dataset_inputs} if run.inputs else set()
        wanted = [split for split in view.splits if f"{self._suite.name}/{split}" not in known]
        datasets = [
            DatasetInput(
                Dataset(
                    name=f"{self._suite.name}/{split}",
                    digest=self._suite.digest[:36],  # MLflow takes no more
                    source_type="local" if self._suite.folder else "agentlab",
                    source=json.dumps({"uri": self._suite.folder or self._suite.name, "split": split}),
                    profile=json.dumps(
                        {"num_rows": self._suite.counts.get(split, 0), "suite_sha256": self._suite.digest}
                    ),
                ),
                [InputTag("mlflow.data.context", view.splits[split])],
            )
            for split in wanted
        ]
        if datasets:
            self._client.log_inputs(run.info.run_id, datasets)

    def _apply_status(self, view: RunView, run: Any) -> None:
        now = run.info.status
        reported = ("FAILED", "KILLED")
        if now == view.status or (now in reported and view.status in reported):
            return  # what was said when it happened outweighs what the journal lets one guess
        self.set_status(run.info.run_id, view.status, view.span.ended_ms if view.span else None)

    def set_status(self, run_id: str, status: str, ended_ms: int | None = None) -> None:
        if status in TERMINAL:
            self._client.set_terminated(run_id, status, ended_ms)
        else:
            self._client.update_run(run_id, status=status)
