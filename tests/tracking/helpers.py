"""A run's folder, written step by step as a generation writes it, with tiny adapters; and what MLflow shows of it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from agentlab import config, events, files
from agentlab.evolution.run import Run, adapter_id, generation_of
from agentlab.records import BASE, Candidate, GenerationResult, Genome, Score, SealedResult, Training, Verdict
from agentlab.tracking import Recorder, SuiteInfo, configure

SUITE = SuiteInfo("toolcalls", "ab" * 32, None, {"train": 64, "fitness": 32, "gate": 100, "test": 200})


class Story:
    """Writes records and journal, and shows each event to the recorder if there is one."""

    def __init__(self, root: Path, seed: int = 7, recorder: bool = True) -> None:
        values: dict[str, Any] = {"name": "tiny", "seed": seed, "population": {"size": 2, "generations": 2, "pool": 2}}
        self.run = Run(root, config.from_mapping(values, "test"), f"{seed:08d}")
        self.recorder = Recorder(self.run, SUITE, system_metrics=False) if recorder else None

    def emit(self, event: events.Event) -> None:
        self.run.journal.append(event)
        if self.recorder is not None:
            self.recorder.observe(event)

    def begin(self, generation: int, parents: list[list[str]] | None = None) -> list[str]:
        """Start a generation of two candidates with these parents; their ids."""
        parents = parents or [[], []]
        self.emit(events.GenerationStarted(generation=generation, pid=os.getpid(), continued=False))
        genomes = [self._genome(adapter_id(generation, index), value) for index, value in enumerate(parents)]
        self.run.save_population(generation, genomes)
        for genome in genomes:
            self.run.save_candidate(Candidate(genome=genome))
        return [genome.candidate for genome in genomes]

    def _genome(self, adapter: str, parents: list[str]) -> Genome:
        return Genome(
            candidate=adapter,
            generation=generation_of(adapter),
            operator="crossover" if parents else "founder",
            parents=parents,
            merge_weights=[1 / len(parents)] * len(parents) if parents else [],
            merge_method="exact",
            rank=4,
            alpha=8.0,
            dropout=0.0,
            target_modules=["q_proj", "v_proj"],
            learning_rate=5e-4,
            steps=3,
            batch_size=8,
            data_mix={"no tool": 2.0},
            weight_noise=0.0,
            mutated=[],
            seed=11,
        )

    def change(self, adapter: str, **values: Any) -> Candidate:
        candidate = self.run.candidate(adapter)
        assert candidate is not None
        candidate = candidate.model_copy(update=values)
        self.run.save_candidate(candidate)
        return candidate

    def train(self, adapter: str) -> None:
        self.emit(events.TrainingStarted(candidate=adapter, steps=3, learning_rate=5e-4, rank=4))
        folder = self.run.adapter_folder(adapter)
        folder.mkdir(parents=True)
        save_file({"a": np.full((4, 8), generation_of(adapter), np.float32)}, folder / "adapter_model.safetensors")
        files.write_json(folder / "card.json", {"adapter_id": adapter})
        training = Training(train_seconds=1.5, train_tokens=640, losses=[2.0, 1.5, 1.0], ram_peak_mib=700.0)
        digest = files.sha256_file(folder / "adapter_model.safetensors")
        self.change(adapter, state="trained", training=training, weights_sha256=digest)
        self.emit(events.Trained(candidate=adapter, train_seconds=1.5, train_tokens=640, loss=1.0))

    def evaluate(self, adapter: str, fitness: float) -> None:
        score = fake_score(adapter, "fitness", fitness)
        self.change(adapter, state="evaluated", score=score)
        self.emit(
            events.Evaluated(
                candidate=adapter,
                split="fitness",
                accuracy=fitness,
                accuracy_ci_low=score.accuracy_ci_low,
                accuracy_ci_high=score.accuracy_ci_high,
                items=2,
                fitness=fitness,
                seconds=0.5,
            )
        )

    def finish(self, generation: int, pool: list[str], culled: list[str], champion: str, incumbent: str = BASE) -> None:
        for adapter in pool:
            self.change(adapter, state="kept")
        for adapter in culled:
            self.change(adapter, state="culled")
            (self.run.adapter_folder(adapter) / "adapter_model.safetensors").unlink()
        verdict = Verdict(
            generation=generation,
            challenger=pool[0],
            incumbent=incumbent,
            wins=30,
            losses=2,
            items=100,
            challenger_accuracy=0.8,
            incumbent_accuracy=0.5,
            p_value=1e-6,
            alpha=0.025,
            detectable_gain=0.1,
            passed=champion == pool[0],
            verdict=f"{pool[0]} is better",
        )
        members = [adapter for adapter in [*pool, *culled] if generation_of(adapter) == generation]
        self.run.save_result(
            GenerationResult(
                generation=generation,
                members=members,
                pool=pool,
                culled=culled,
                champion=champion,
                verdict=verdict,
                seconds=9.0,
            )
        )
        self.emit(events.Selected(generation=generation, pool=pool, culled=culled))
        self.emit(events.GenerationFinished(generation=generation, champion=champion, seconds=9.0))

    def seal(self, champion: str) -> SealedResult:
        sealed = SealedResult(
            champion=champion,
            champion_sha256="cd" * 32,
            items=200,
            base=fake_score(BASE, "test", 0.125),
            champion_score=fake_score(champion, "test", 0.875),
            gain=0.75,
            gain_ci_low=0.7,
            gain_ci_high=0.8,
            openings=1,
        )
        self.run.save_sealed(sealed)
        self.emit(
            events.SealedComparison(
                champion=champion,
                items=200,
                base_accuracy=0.125,
                champion_accuracy=0.875,
                gain=0.75,
                gain_ci_low=0.7,
                gain_ci_high=0.8,
                openings=1,
            )
        )
        return sealed

    def two_generations(self) -> None:
        """Founders a, b; children c (of both) and d (of a); b is culled, first a and then c is champion."""
        a, b = self.begin(0)
        for adapter, fitness in ((a, 0.5), (b, 0.25)):
            self.train(adapter)
            self.evaluate(adapter, fitness)
        self.finish(0, [a, b], [], champion=a)
        c, d = self.begin(1, [[a, b], [a]])
        for adapter, fitness in ((c, 0.75), (d, 0.5)):
            self.train(adapter)
            self.evaluate(adapter, fitness)
        self.finish(1, [c, a], [b, d], champion=c, incumbent=a)


def fake_score(adapter: str, split: str, accuracy: float) -> Score:
    return Score(
        adapter=adapter,
        split=split,
        suite="toolcalls",
        engine="transformers",
        item_scores=[1.0, 0.0],
        answers=["x", "y"],
        prompt_tokens=[10, 11],
        completion_tokens=[5, 6],
        accuracy=accuracy,
        accuracy_ci_low=accuracy - 0.1,
        accuracy_ci_high=accuracy + 0.1,
        latency_estimated_s=1.25,
        latency_p50_s=1.0,
        latency_p95_s=1.5,
        ram_peak_mib=900.0,
        eval_seconds=0.5,
        fitness=accuracy,
    )


class Shown:
    """What MLflow holds for a run, read through its own client."""

    def __init__(self, run: Run) -> None:
        self.client = configure(run.root)
        experiment = self.client.get_experiment_by_name(run.settings.name)
        assert experiment is not None
        self.experiment_id = experiment.experiment_id
        self.runs = {
            value.info.run_name: self.client.get_run(value.info.run_id)  # a search returns no model inputs
            for value in self.client.search_runs([self.experiment_id], f"tags.`agentlab.run` = '{run.id}'")
        }
        self.models = {
            value.name: value
            for value in self.client.search_logged_models(
                [self.experiment_id], f"tags.`agentlab.run` = '{run.id}'", max_results=100
            )
        }

    def statuses(self) -> dict[str, str]:
        return {name: run.info.status for name, run in self.runs.items()}

    def everything(self) -> dict[str, Any]:
        """All that must not change when a run is reconciled again, with every point of every metric."""
        return {
            "runs": {
                name: (
                    run.info.run_id,
                    run.info.status,
                    run.data.params,
                    run.data.tags,
                    {key: len(self.client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics},
                    [value.dataset.name for value in run.inputs.dataset_inputs],
                    [value.model_id for value in run.inputs.model_inputs],
                    [value.model_id for value in run.outputs.model_outputs],
                )
                for name, run in self.runs.items()
            },
            "models": {
                name: (model.model_id, model.status, model.tags, model.params, len(model.metrics))
                for name, model in self.models.items()
            },
            "versions": {
                version.version: version.tags for version in self.client.search_model_versions("name LIKE '%'")
            },
            "all runs": len(self.client.search_runs([self.experiment_id])),
            "all models": len(self.client.search_logged_models([self.experiment_id], max_results=100)),
        }
