"""Adapters as MLflow models: one LoggedModel per evaluated candidate, linked to its parents, and the registry.

MLflow's run parents group runs; genealogy is something else: an adapter's run has its parents' models as inputs and its
own as output.
"""

import json
from typing import TYPE_CHECKING, Any

from agentlab.evolution.run import Run
from agentlab.records import Candidate, GenerationResult
from agentlab.tracking.artifacts import local_path, remove_artifacts
from agentlab.tracking.runs import Found
from agentlab.tracking.views import candidate_metrics, flat_genome, lineage_tags, same

if TYPE_CHECKING:
    from mlflow import MlflowClient

Models = dict[str, Any]  # adapter id → mlflow.entities.LoggedModel
ALIAS = "champion"
_VERSIONS = "mlflow.modelVersions"
_WEIGHTS = "agentlab.weights_sha256"
_MODEL = "agentlab.model_id"  # a search for versions does not return their model


class ModelShelf:
    """The LoggedModels and registered versions of one evolution run. Its methods are called under the store's lock."""

    def __init__(self, client: "MlflowClient", run: Run, experiment_id: str) -> None:
        self._client = client
        self._run = run
        self._experiment_id = experiment_id

    def find(self) -> Models:
        """All models by adapter id. Of duplicates the oldest stays, the others are deleted with their copies."""
        found: Models = {}
        token = None
        while True:
            page = self._client.search_logged_models(
                [self._experiment_id],
                f"tags.`agentlab.run` = '{self._run.id}'",
                order_by=[{"field_name": "creation_timestamp", "ascending": True}],
                page_token=token,
            )
            for model in page:
                adapter = model.tags["agentlab.adapter_id"]
                if adapter in found:
                    self._delete(model)
                else:
                    found[adapter] = model
            token = page.token
            if not token:
                return found

    def _delete(self, model: Any) -> None:
        remove_artifacts(self._run.root, model.artifact_location)
        self._client.delete_logged_model(model.model_id)

    def apply(self, candidate: Candidate, runs: Found, models: Models) -> None:
        """Make one candidate's LoggedModel like its record. Parents must have been applied before.

        Weights are copied while the adapter is in the pool and deleted when it is culled; the record stays.
        """
        if candidate.training is None or candidate.score is None or candidate.state == "failed":
            return
        adapter = candidate.genome.candidate
        mlflow_run = runs[adapter]
        model = models.get(adapter)
        if model is not None and model.source_run_id != mlflow_run.info.run_id:
            self._delete(model)  # of a candidate that is no longer on disk
            model = None
        if model is None:
            model = self._client.create_logged_model(
                self._experiment_id,
                name=adapter,
                source_run_id=mlflow_run.info.run_id,
                tags=lineage_tags(self._run, candidate),
                params=flat_genome(candidate) | {"base_model": self._run.settings.model.primary},
                model_type="lora-adapter",
            )
            models[adapter] = model
        tags = lineage_tags(self._run, candidate)
        self._apply_weights(candidate, model)
        changed = {key: value for key, value in tags.items() if model.tags.get(key) != value}
        if changed:
            self._client.set_logged_model_tags(model.model_id, changed)
        self._apply_metrics(candidate, model, mlflow_run.info.run_id)
        self._link(candidate, model, mlflow_run, models)

    def _apply_weights(self, candidate: Candidate, model: Any) -> None:
        from mlflow.entities import LoggedModelStatus

        folder = self._run.adapter_folder(candidate.genome.candidate)
        digest = candidate.weights_sha256 or ""
        complete = model.status == LoggedModelStatus.READY
        if candidate.state == "culled":
            remove_artifacts(self._run.root, model.artifact_location)
        elif any(folder.glob("*.safetensors*")):
            copied = complete and model.tags.get(_WEIGHTS) == digest and local_path(model.artifact_location).is_dir()
            if not copied:
                self._client.log_model_artifacts(model.model_id, str(folder))
                self._client.set_logged_model_tags(model.model_id, {_WEIGHTS: digest})
        if not complete:  # a kill while copying leaves it PENDING, and the next time it is copied again
            self._client.finalize_logged_model(model.model_id, "READY")

    def _apply_metrics(self, candidate: Candidate, model: Any, run_id: str) -> None:
        from mlflow.entities import Metric

        latest: dict[str, tuple[int, float]] = {}
        for metric in model.metrics or []:
            latest[metric.key] = max(latest.get(metric.key, (0, 0.0)), (metric.timestamp, metric.value))
        missing = []
        for key, value in candidate_metrics(self._run.settings, candidate).items():
            if key in latest and same(latest[key][1], value):
                continue
            # MLflow writes a model's metric to its run, too. With the run's own timestamp that is the same point.
            history = self._client.get_metric_history(run_id, key)
            missing.append(Metric(key, value, history[-1].timestamp, 0, model_id=model.model_id))
        if missing:
            self._client.log_batch(run_id, metrics=missing, synchronous=True)

    def _link(self, candidate: Candidate, model: Any, mlflow_run: Any, models: Models) -> None:
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        run_id = mlflow_run.info.run_id
        outputs = mlflow_run.outputs.model_outputs if mlflow_run.outputs else []
        if model.model_id in {output.model_id for output in outputs}:
            return  # linked last, so it vouches for the parents
        fresh = self._client.get_run(run_id)  # a search returns no model inputs, and outputs cannot be logged twice
        known = {value.model_id for value in fresh.inputs.model_inputs} if fresh.inputs else set()
        for parent in dict.fromkeys(candidate.genome.parents):
            found = models.get(parent)
            if found is not None and found.model_id not in known:
                self._client.log_inputs(run_id, models=[LoggedModelInput(found.model_id)])
        outputs = fresh.outputs.model_outputs if fresh.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])

    # -- registry -----------------------------------------------------------------------------------------------

    def register(self, results: list[GenerationResult], runs: Found, models: Models) -> None:
        """One version per champion of this run in `agentlab-<experiment>`; the alias is on the last one.

        Runs of one experiment share the registered model, so the alias moves only to a version that is new or when it
        is on another version of this run: looking at an old run again does not take it back.
        """
        champions = list(dict.fromkeys(result.champion for result in results if result.champion in models))
        if not champions or results[-1].champion not in models:
            return
        name = registered_name(self._run)
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        versions: dict[str, Any] = {}
        for version in self._client.search_model_versions(f"name = '{name}'"):
            adapter_id = version.tags.get("agentlab.adapter_id")
            if version.tags.get("agentlab.run") != self._run.id or adapter_id is None:
                continue
            model = models.get(adapter_id)
            if adapter_id not in versions or (model is not None and version.tags.get(_MODEL) == model.model_id):
                versions[adapter_id] = version  # a run that a person deleted has left one of the model that went too
        created = set()
        for adapter in champions:
            model_id = models[adapter].model_id
            if adapter not in versions or versions[adapter].tags.get(_MODEL) != model_id:
                versions[adapter] = self._client.create_model_version(
                    name,
                    # Not models:/<id>: that is looked up in the process-wide tracking URI, not in this client's.
                    models[adapter].artifact_location,
                    runs[adapter].info.run_id,
                    tags={"agentlab.run": self._run.id, "agentlab.adapter_id": adapter, _MODEL: model_id},
                    model_id=model_id,
                )
                created.add(adapter)
            named = json.dumps([{"name": name, "version": str(versions[adapter].version)}])
            if models[adapter].tags.get(_VERSIONS) != named:  # what the model's page shows
                self._client.set_logged_model_tags(model_id, {_VERSIONS: named})
        self._move_alias(name, versions, results[-1].champion, created)

    def _move_alias(self, name: str, versions: Models, champion: str, created: set[str]) -> None:
        target = versions[champion].version
        holder = self._client.get_registered_model(name).aliases.get(ALIAS)
        ours = {str(version.version) for version in versions.values()}
        if holder is None or champion in created or (str(holder) in ours and str(holder) != str(target)):
            self._client.set_registered_model_alias(name, ALIAS, str(target))


def registered_name(run: Run) -> str:
    """Name of the registered model that all runs of an experiment share."""
    return f"agentlab-{run.settings.name}"
