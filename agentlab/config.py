"""The settings of one experiment: read from YAML, overridden by `--set`, validated before anything is loaded."""

import difflib
import os
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from agentlab.errors import ConfigError
from agentlab.files import canonical_digest, parse_yaml


def _number(value: object) -> object:
    # YAML 1.1 reads 5e-4 (no dot) as a string, and pydantic would read true as 1.
    if isinstance(value, bool):
        raise ValueError("a number, not true/false")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number") from None
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False, strict=False)]
MergeMethod = Literal[
    "exact", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"
]


RungName = Literal["fp32", "bf16", "int8", "nf4", "hqq3"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class ModelSettings(_Section):
    """Which models answer, and on which engine. `engine: auto` takes the best one installed that fits.

    openai: a server at `base_url` (like http://localhost:11434/v1), where the models have the names given here;
    `api_key_env` names an environment variable. What the server does not say: `context_length` in tokens, and
    `tokenizer`, the name or folder of a model on this machine whose tokens are counted.

    `rung` is the precision of the weights; `auto` is the most precise one that fits into the budget. vLLM loads bf16
    on a GPU and fp32 on a CPU; at any other rung transformers answers.
    """

    primary: str = "smollm2-135m-instruct"
    fallback: str | None = None
    emergency: str | None = None
    engine: Literal["auto", "transformers", "vllm", "openai"] = "auto"
    rung: Literal["auto", RungName] = "auto"
    base_url: str | None = Field(None, pattern=r"^https?://[^\s@]+$")
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    context_length: int | None = Field(None, ge=128)
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModelSettings":
        if self.engine == "openai" and self.base_url is None:
            raise ValueError("base_url: None; allowed with engine openai: an address like http://localhost:11434/v1")
        if self.engine == "vllm" and self.rung not in ("auto", "bf16", "fp32"):
            raise ValueError(
                f"rung: {self.rung!r}; allowed with engine vllm: auto, bf16 on a GPU, fp32 on a CPU; others with "
                "engine transformers"
            )
        if self.engine != "openai":
            given = [key for key in ("base_url", "api_key_env", "context_length", "tokenizer") if getattr(self, key)]
            if given:
                raise ValueError(f"{given[0]}: {getattr(self, given[0])!r}; allowed: null, or engine openai")
        return self


class BudgetSettings(_Section):
    """Limits. Fitness is measured against the first two: GiB of accelerator memory, seconds per answer.

    Of `vram_gib`, `context_gib` are the driver's and the libraries' own; `reserve_gib` of the card stay free beyond it.
    `memory_efficiency` is the least share of the reserved memory that answers shall use; `memory_alert` the share of
    used memory, `temperature_c` the heat, and `swap_gib` the machine's used swap, from which the monitor warns; beyond
    the last one no model is moved to the CPU. There at most `ram_fraction` of the RAM and `threads` threads are used.
    """

    vram_gib: Number = Field(5.0, gt=0, le=4096)
    latency_s: Number = Field(2.0, gt=0, le=86_400)
    context_gib: Number = Field(0.35, ge=0)
    reserve_gib: Number = Field(0.5, ge=0, le=4096)
    memory_efficiency: Number = Field(0.8, ge=0, le=1)
    memory_alert: Number = Field(0.9, gt=0, le=1)
    temperature_c: Number = Field(80, gt=0)
    ram_fraction: Number = Field(0.8, gt=0, le=1)
    swap_gib: Number = Field(8.0, ge=0)
    threads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _room_for_a_model(self) -> "BudgetSettings":
        if self.context_gib >= self.vram_gib:
            raise ValueError(f"context_gib: {self.context_gib:g}; allowed: less than vram_gib = {self.vram_gib:g}")
        return self


class PopulationSettings(_Section):
    """How many candidates, for how long, and how they are bred.

    `blend`: each generation of children ends with one candidate more, its two best merged and not trained.
    """

    size: int = Field(4, ge=1, le=99)
    generations: int = Field(3, ge=1, le=1000)
    elites: int = Field(1, ge=0)
    pool: int = Field(10, ge=1, le=10)
    tournament: int = Field(3, ge=1)
    crossover_rate: Number = Field(0.7, ge=0, le=1)
    mutation_rate: Number = Field(0.1, ge=0, le=1)
    blend: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "PopulationSettings":
        if self.elites >= self.size:
            raise ValueError(
                f"elites: {self.elites}; allowed: 0 to size - 1 = {self.size - 1}, so that something new is bred"
            )
        if self.elites > self.pool:
            raise ValueError(f"pool: {self.pool}; allowed: at least elites = {self.elites}")
        return self


class CrossoverSettings(_Section):
    """How two parents are merged: `exact` is the project's own rank-truncated sum, the others are PEFT's."""

    method: MergeMethod = "exact"
    density: Number = Field(0.5, gt=0, le=1)


class MutationSettings(_Section):
    """How far one mutation goes. `weight_noise` is relative to each matrix's own norm."""

    weight_noise: Number = Field(0.02, ge=0, le=1)
    max_rank: int = Field(64, ge=1, le=256)


class LoraSettings(_Section):
    """The founders' LoRA: delta = B·A·alpha/rank on every module whose name ends in one of `target_modules`."""

    rank: int = Field(16, ge=1, le=256)
    alpha: Number = Field(32, gt=0)
    dropout: Number = Field(0.1, ge=0, lt=1)
    target_modules: Annotated[list[str], Field(min_length=1)] = ["q_proj", "k_proj", "v_proj", "o_proj"]


class TrainingSettings(_Section):
    """One candidate's training: about `tokens` of prompts and answers, in steps of `batch_size` items.

    So a suite of short items gets more steps in the same time; `steps` sets their number instead. Founders get
    `founder_share` of it: they scout learning rates, spread around `learning_rate`, and most of what they learn is lost
    to selection (with one generation alone, all of it). Of several children the first continues the fittest adapter's
    training, with the largest share; the others are crossed and mutated, and so is an only child. The first generation
    of children gets most and the last one least, `tokens` in the mean of all children.
    `average` is the share of a candidate's steps, the last ones, whose weights are averaged, at a steady rate; with 0
    the rate falls to zero and the last weights count.
    `focus` is how much a continuation prefers items that it would get wrong just now (0: not at all): halfway, and at
    the beginning unless it continues a founder, it looks at twice as many items as it is trained on next.
    `loraplus_ratio` is how many times faster than LoRA's A its B is trained, around `learning_rate`; 1: alike.
    `max_length` is in tokens of prompt and answer together. `max_remedies` are tried against NaN and divergence.
    """

    method: Literal["sft"] = "sft"
    tokens: int = Field(16_000, ge=1)
    steps: int | None = Field(None, ge=1)
    founder_share: Number = Field(0.3, gt=0, le=1)
    batch_size: int = Field(8, ge=1)
    learning_rate: Number = Field(2.0e-3, gt=0, le=1)
    warmup_steps: int = Field(1, ge=0)
    average: Number = Field(0.5, ge=0, le=1)
    focus: Number = Field(0.95, ge=0, lt=1)
    loraplus_ratio: Number = Field(1.0, ge=1, le=64)
    max_length: int = Field(1024, ge=16)
    max_remedies: int = Field(3, ge=0)


class EvaluationSettings(_Section):
    """How answers are produced for scoring. `max_new_tokens: null` = 1.25 × the suite's longest training answer + 4.

    `latency_items` are answered one at a time to measure latency.
    """

    batch_size: int = Field(32, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    latency_items: int = Field(2, ge=1)


class GateSettings(_Section):
    """The chance, over the whole run, that a champion is promoted that is no better than the one before."""

    alpha: Number = Field(0.05, gt=0, lt=1)
    accuracy_threshold: Number = Field(0.85, ge=0, le=1)


class MemorySettings(_Section):
    """Where the agent's memory lives; null: the person's own, under AGENTLAB_HOME."""

    path: str | None = None


class Settings(_Section):
    """One experiment, complete: every key has a value that suits the embedded model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    seed: int = Field(7, ge=0, lt=2**31)
    suite: str = "toolcalls"
    model: ModelSettings = ModelSettings()
    budget: BudgetSettings = BudgetSettings()
    population: PopulationSettings = PopulationSettings()
    crossover: CrossoverSettings = CrossoverSettings()
    mutation: MutationSettings = MutationSettings()
    lora: LoraSettings = LoraSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    gate: GateSettings = GateSettings()
    memory: MemorySettings = MemorySettings()

    @property
    def continues(self) -> bool:
        """Whether a generation's first child goes on where an earlier training ended: not an only child, which is
        crossed or mutated, and not from a learning rate that fell to zero.
        """
        population = self.population
        several = population.size - min(population.elites, 1) > 1  # a pool may hold fewer than the elites
        return several and population.generations > 1 and self.training.average > 0

    def run_hash(self, suite_digest: str) -> str:
        """Eight hex digits that name the run: they change with any setting and with any item of the suite."""
        return canonical_digest([self.model_dump(mode="json"), suite_digest])[:8]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of silently taking the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, Hashable):
                raise ConfigError(f"key {key} in line {key_node.start_mark.line + 1} is no name; allowed: a text")
            if key in seen:
                raise ConfigError(f"key {key} is written twice, the second time in line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load(path: Path, overrides: Iterable[str] = ()) -> Settings:
    """The validated settings in `path` with `overrides` like "training.steps=12" on top.

    Raises ConfigError that names the file, the key, the value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"no experiment at {path}; there are: {', '.join(known) or 'none in that folder'}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    try:
        values = parse_yaml(text, _Loader)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings; the least is one line: name: {path.stem}")
    overridden = [_apply(values, override) for override in overrides]
    return from_mapping(values, str(path), overridden)


def _apply(values: dict[str, Any], override: str) -> str:
    """Put `override` into `values`; the dotted key that it set."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as key=value, for example training.steps=12")
    *sections, last = (part.strip() for part in key.split("."))
    if not all((*sections, last)):
        raise ConfigError(f"--set {override}: a name between the dots is empty; allowed: like training.steps=12")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
    try:
        values[last] = parse_yaml(text, _Loader)
    except ValueError:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value; put a text in quotes") from None
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from None
    return ".".join((*sections, last))


def from_mapping(values: Mapping[str, Any], source: str, overridden: Collection[str] = ()) -> Settings:
    """Validate a mapping; `source`, or --set for the dotted keys that are `overridden`, is named in errors."""
    try:
        return Settings.model_validate(dict(values))
    except pydantic.ValidationError as error:
        problems: dict[str, list[str]] = {}
        for problem in error.errors():
            problems.setdefault(_source(problem, source, overridden), []).append(_sentence(problem))
        raise ConfigError("; ".join(f"in {where}: {'; '.join(found)}" for where, found in problems.items())) from None


def _source(problem: Any, source: str, overridden: Collection[str]) -> str:
    """Where the value of a problem was written."""
    where = ".".join(str(part) for part in problem["loc"])
    if any(f"{where}.".startswith(f"{key}.") for key in overridden):
        return "--set"
    among = any(not where or key.startswith(f"{where}.") for key in overridden)  # of a section, or of all of it
    return f"{source} with --set" if among else source


_SHOWN = 200  # characters of a wrong value in a message
_PATTERNS = {
    "name": "small letters, digits and hyphens, beginning with a letter or digit",
    "base_url": "an address like http://localhost:11434/v1, without a name and a password",
    "api_key_env": "the name of an environment variable, like OPENAI_API_KEY",
}


def _sentence(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path) or "settings"
    if problem["type"] == "extra_forbidden":
        allowed = _keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"unknown key {where}{hint} (allowed: {', '.join(allowed)})"
    message = re.sub(r"^(Value error, |Input )", "", problem["msg"])
    if problem["type"] == "missing":
        return f"key {where} is missing"
    if problem["type"] == "invalid_key":
        return f"key {where} is no name; allowed: a text"
    shown, allowed_text = problem["input"], message.removeprefix("should be ")
    if problem["type"] == "string_pattern_mismatch" and path[-1] in _PATTERNS:
        allowed_text = _PATTERNS[path[-1]]
    if problem["type"] == "string_type":
        allowed_text = "a text (quote it in YAML)"
    elif problem["type"] == "model_type":
        allowed_text = f"a section with keys {', '.join(_keys(problem['loc']))}"
    elif isinstance(shown, dict):
        return f"key {where}: {message}"
    return f"key {where}: {_short(shown if isinstance(shown, date) else repr(shown))}; allowed: {allowed_text}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} … ({len(text):,} characters)"


def _keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Settings
    for part in location:
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) else get_args(annotation)[0]
    return list(model.model_fields)


def dump(settings: Settings) -> str:
    """The settings as YAML, every key written out."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def project_root(experiment: Path) -> Path:
    """The folder above the YAML's `experiments/`; the YAML's own folder where it lies elsewhere. Absolute."""
    folder = experiment.resolve().parent
    return folder.parent if folder.name == "experiments" else folder


def home() -> Path:
    """AGENTLAB_HOME, by default the user's data folder: the model cache, the lease and the person's memory."""
    if custom := os.environ.get("AGENTLAB_HOME"):
        return Path(custom).expanduser().resolve()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data).expanduser().resolve() / "agentlab"
