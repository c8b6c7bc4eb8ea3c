"""The folder of one run: where each record lies, and how it is read and written.

experiments/<name>/<hash>/
  config.yaml         the resolved settings
  model.json          name and digest of the base model
  plan.json           the memory that was planned before the model was loaded
  events.jsonl        the journal
  rates.json          calibrated once
  base/               the base model's own scores: fitness.json, gate.json
  generations/000/    population.json, g000-c00.json …, gate-<id>.json, result.json, notebook.ipynb, figures
  adapters/g000-c00/  card.json and, while in the pool, the weights
  training-states/    g000-c00.safetensors …: where trainings ended, while one of them may be continued
  seal-openings.json  the hashes of the models that were let at the sealed split
  sealed.json         answers of base and champion on it
  baseline.json       the plain SFT of equal cost, when it was asked for; its weights in plain-sft/
  STOP                present while somebody asks the run to stop
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic

from agentlab import config, files
from agentlab.config import RungName
from agentlab.errors import AgentlabError, StorageError
from agentlab.events import (
    EvolutionStarted,
    GenerationFailed,
    GenerationFinished,
    GenerationStarted,
    Journal,
    Stopped,
)
from agentlab.records import (
    BASE,
    BaselineResult,
    BaseModelRecord,
    Candidate,
    GenerationResult,
    Genome,
    Score,
    SealedResult,
    Verdict,
)

Record = TypeVar("Record", bound=pydantic.BaseModel)
Value = TypeVar("Value")


class _Phase(pydantic.BaseModel, extra="allow"):
    name: str
    total_bytes: int
    lines_bytes: dict[str, int]
    chosen: dict[str, int] = {}


class _PlannedModel(pydantic.BaseModel, extra="allow"):
    rung: str
    phases: list[_Phase]


class _Plan(pydantic.BaseModel, extra="allow"):
    models: Annotated[list[_PlannedModel], pydantic.Field(min_length=1)]


_POPULATION = pydantic.TypeAdapter(Annotated[list[Genome], pydantic.Field(min_length=1)])
_OPENINGS = pydantic.TypeAdapter(list[list[str]])


@dataclasses.dataclass(frozen=True)
class Run:
    """One resolved config and its folder."""

    root: Path  # project root, absolute
    settings: config.Settings
    run_hash: str
    suite_folder: str = ""

    @property
    def folder(self) -> Path:
        return self.root / "experiments" / self.settings.name / self.run_hash

    @property
    def id(self) -> str:
        """name/hash, unique in the project."""
        return f"{self.settings.name}/{self.run_hash}"

    @property
    def journal(self) -> Journal:
        return Journal(self.folder / "events.jsonl")

    @property
    def launcher_lock(self) -> Path:
        return self.folder / "launcher.lock"

    @property
    def worker_lock(self) -> Path:
        return self.folder / "worker.lock"

    @property
    def stop_file(self) -> Path:
        return self.folder / "STOP"

    def generation_folder(self, generation: int) -> Path:
        return self.folder / "generations" / f"{generation:03d}"

    def adapter_folder(self, adapter: str) -> Path:
        return self.folder / "adapters" / adapter

    def training_state_file(self, adapter: str) -> Path:
        """Where an adapter's training ended, while somebody may still continue it."""
        return self.folder / "training-states" / f"{adapter}.safetensors"

    def forget_training_states(self, generation: int, keep: str | None) -> None:
        """Delete where the trainings of this generation and those before it ended, but for one adapter's."""
        folder = self.folder / "training-states"
        with files.disk_errors(folder):
            for path in folder.glob("g[0-9][0-9][0-9]-c*.safetensors"):
                if path.stem != keep and generation_of(path.stem) <= generation:
                    path.unlink(missing_ok=True)
            for path in folder.glob(".*.safetensors.*.tmp"):  # of a killed writer
                path.unlink(missing_ok=True)

    # -- records ------------------------------------------------------------------------------------------------

    def population(self, generation: int) -> list[Genome] | None:
        """Genomes bred for a generation; None before breeding."""
        return checked(self.generation_folder(generation) / "population.json", _POPULATION)

    def save_population(self, generation: int, genomes: list[Genome]) -> None:
        path = self.generation_folder(generation) / "population.json"
        files.write_json(path, [genome.model_dump(mode="json") for genome in genomes])

    def candidate(self, adapter: str) -> Candidate | None:
        return _read(self._candidate_path(adapter), Candidate)

    def kept_candidate(self, adapter: str) -> Candidate:
        """A candidate that a finished generation relies on. Raises StorageError when its record is gone."""
        candidate = self.candidate(adapter)
        if candidate is None:
            raise StorageError(
                f"{self._candidate_path(adapter)} is missing, and its generation is finished; restore it from a copy"
            )
        return candidate

    def save_candidate(self, candidate: Candidate) -> None:
        _write(self._candidate_path(candidate.genome.candidate), candidate)

    def _candidate_path(self, adapter: str) -> Path:
        return self.generation_folder(generation_of(adapter)) / f"{adapter}.json"

    def candidates(self) -> list[Candidate]:
        """All candidates ever bred in this run, in breeding order; a generation's blend comes last."""
        found: list[Candidate] = []
        for generation in range(self.settings.population.generations):
            genomes = self.population(generation) or []
            found += [self.candidate(genome.candidate) or Candidate(genome=genome) for genome in genomes]
            bred = {genome.candidate for genome in genomes}
            files_there = sorted(self.generation_folder(generation).glob(f"g{generation:03d}-c*.json"))
            later = [self.candidate(path.stem) for path in files_there if path.stem not in bred]
            found += [candidate for candidate in later if candidate is not None]
        return found

    def result(self, generation: int) -> GenerationResult | None:
        return _read(self.generation_folder(generation) / "result.json", GenerationResult)

    def save_result(self, result: GenerationResult) -> None:
        _write(self.generation_folder(result.generation) / "result.json", result)

    def results(self) -> list[GenerationResult]:
        """Results of the finished generations, in order, up to the first gap."""
        found: list[GenerationResult] = []
        for generation in range(self.settings.population.generations):
            result = self.result(generation)
            if result is None:
                break
            found.append(result)
        return found

    def verdicts(self) -> list[Verdict]:
        return [result.verdict for result in self.results() if result.verdict is not None]

    def champion(self) -> str:
        """The adapter that last passed the gate, or "base"."""
        results = self.results()
        return results[-1].champion if results else BASE

    def score(self, adapter: str, split: str) -> Score | None:
        """A model's score on `fitness` or `gate` (the sealed one is in `sealed`)."""
        if split == "fitness" and adapter != BASE:
            candidate = self.candidate(adapter)
            return candidate.score if candidate else None
        return _read(self._score_path(adapter, split), Score)

    def save_score(self, score: Score) -> None:
        _write(self._score_path(score.adapter, score.split), score)

    def _score_path(self, adapter: str, split: str) -> Path:
        if adapter == BASE:
            return self.folder / "base" / f"{split}.json"
        return self.generation_folder(generation_of(adapter)) / f"{split}-{adapter}.json"

    def sealed(self) -> SealedResult | None:
        return _read(self.folder / "sealed.json", SealedResult)

    def save_sealed(self, result: SealedResult) -> None:
        _write(self.folder / "sealed.json", result)

    def openings(self) -> list[list[str]]:
        """The frozen list of model hashes of each opening of the sealed split so far."""
        return checked(self.folder / "seal-openings.json", _OPENINGS) or []

    def plan(self) -> dict[str, Any] | None:
        """The memory that was planned when this run last began to work, as `hardware.plan.Plan.as_dict` writes it."""
        found = _read(self.folder / "plan.json", _Plan)
        return None if found is None else found.model_dump()

    def planned_mib(self) -> dict[str, float] | None:
        """The planned memory of the primary model by phase; None before anything was planned.

        On a GPU without what the driver keeps for any process, which no allocator sees: so it compares with the peaks
        that were measured.
        """
        unseen = ("driver_context", "learner_context", "vllm_asleep")
        plan = self.plan()
        if plan is None:
            return None
        return {
            phase["name"]: (phase["total_bytes"] - sum(phase["lines_bytes"].get(line, 0) for line in unseen)) / 2**20
            for phase in plan["models"][0]["phases"]
        }

    def planned_rows(self, phase: Literal["evaluate", "train"]) -> int | None:
        """The largest batch of a phase that was planned to fit; None before anything was planned."""
        name = "batch_size" if phase == "evaluate" else "micro_batch"
        plan = self.plan()
        found = [one["chosen"].get(name) for one in plan["models"][0]["phases"] if one["name"] == phase] if plan else []
        return found[0] if found else None

    def save_plan(self, plan: Mapping[str, Any]) -> None:
        files.write_json(self.folder / "plan.json", dict(plan))

    def rung(self) -> RungName | None:
        """The rung at which the run's adapters are trained, and scored by transformers; None before it began, or as
        stored."""
        found = self.model()
        return None if found is None else cast("RungName | None", found.rung)

    def model(self) -> BaseModelRecord | None:
        """The base model that the run stays with; None before it began."""
        return _read(self.folder / "model.json", BaseModelRecord)

    def save_model(self, record: BaseModelRecord) -> None:
        _write(self.folder / "model.json", record)

    def seconds_before(self, generation: int) -> float:
        """How long earlier attempts at a generation worked that were stopped, failed or killed, by the journal."""
        total, begun, last = 0.0, None, 0.0
        for event in self.journal.replay():
            if isinstance(event, EvolutionStarted | GenerationStarted):
                total += 0.0 if begun is None else last - begun
                ours = isinstance(event, GenerationStarted) and event.generation == generation
                begun = event.time_s if ours else None
            elif begun is not None and isinstance(event, Stopped | GenerationFailed | GenerationFinished):
                total, begun = total + event.time_s - begun, None
            last = max(event.time_s, last)
        return max(0.0, total)  # the newest attempt is the one that asks

    def baseline(self) -> BaselineResult | None:
        return _read(self.folder / "baseline.json", BaselineResult)

    def save_baseline(self, result: BaselineResult) -> None:
        _write(self.folder / "baseline.json", result)


def adapter_id(generation: int, index: int) -> str:
    """Ids have one width, so that none is a prefix of another (PEFT's hot swap confuses such names)."""
    return f"g{generation:03d}-c{index:02d}"


def generation_of(adapter: str) -> int:
    """3 for g003-c02."""
    return int(adapter[1:4])


def _read(path: Path, record: type[Record]) -> Record | None:
    return checked(path, pydantic.TypeAdapter(record))


def checked(path: Path, kind: "pydantic.TypeAdapter[Value]") -> Value | None:
    """What a file holds, None where there is none. Raises StorageError where it is not what belongs there."""
    if not path.exists():
        return None
    try:
        return kind.validate_python(files.read_json(path))
    except pydantic.ValidationError as error:
        raise StorageError(
            f"{path} is damaged ({error.error_count()} fields); restore it from a copy or, while its generation is not "
            "finished, delete it to redo that step"
        ) from None


def _write(path: Path, record: pydantic.BaseModel) -> None:
    files.write_json(path, record.model_dump(mode="json"))


def newest_config(root: Path) -> Path | None:
    """config.yaml of the run below `root` that last crowned a champion, else of the newest run; None without any."""
    found: list[tuple[bool, float, Path]] = []
    for path in sorted((root / "experiments").glob("*/*/config.yaml")):
        with contextlib.suppress(AgentlabError):
            run = Run(root, config.load(path), path.parent.name)
            results = sorted(path.parent.glob("generations/*/result.json"))
            newest = results[-1].stat().st_mtime if results else path.stat().st_mtime
            found.append((run.champion() != BASE, newest, path))
    return max(found)[2] if found else None
