"""Which engine answers, and opening it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agentlab.config import RungName, Settings
from agentlab.errors import ConfigError, ModelError
from agentlab.hardware import ledger
from agentlab.hardware.ledger import GIB
from agentlab.hardware.monitor import gpus, memory_stats
from agentlab.hardware.recovery import Footprint
from agentlab.hardware.rungs import FP32, LADDER, Rung, element_bytes
from agentlab.hardware.shape import ModelShape, ShapeError
from agentlab.hardware.sizing import LEAST_TOKENS, Device, Machine, Model, Workload, phases_of
from agentlab.inference import stored, vllm_build
from agentlab.inference.contract import Engine, NoRoomElsewhereError, OutOfMemoryError
from agentlab.models import ModelFiles, resolve

if TYPE_CHECKING:
    from agentlab.inference.vllm_settings import ModelSizes, VllmSettings

EngineName = Literal["transformers", "vllm", "openai"]
# A start takes some half a minute on a GPU, in each generation's process anew: an estimate, never measured on a card.
_WORTH_BYTES = GIB


def choose_engine(settings: Settings, model: ModelFiles) -> EngineName:
    """The engine that the settings ask for. `auto`: vLLM on an accelerator where it is installed, loads the rung that
    is asked for, and a model that is worth its start fits; anywhere for one that is quantized in its files so that it
    alone loads it.

    On a CPU vLLM decodes with adapters several times slower than transformers, so `auto` is transformers there.
    """
    wanted = settings.model
    if wanted.engine != "auto":
        return wanted.engine
    if only_on_vllm(model):
        return "vllm"
    known = stored.by_vllm(stored.stored_quantization(model.folder), "cuda")
    suits = runs_vllm() and known and vllm_loads(wanted.rung, "cuda") and _suits_vllm(settings, model)
    return "vllm" if suits else "transformers"


def engine_of_run(settings: Settings, model: ModelFiles, bound: EngineName | None) -> EngineName:
    """The engine that a run is bound to by its scores, where it is here; where there are none `choose_engine`'s."""
    if settings.model.engine != "auto" or bound is None or only_on_vllm(model):
        return choose_engine(settings, model)
    return bound if runs_vllm() else "transformers"


def only_on_vllm(model: ModelFiles) -> bool:
    """Whether the model is quantized in its files so that vLLM, which is here, loads it and transformers does not."""
    method = stored.stored_quantization(model.folder)
    if method is None or (device := vllm_build.device()) is None or not stored.by_vllm(method, device):
        return False
    return bool(stored.not_by_transformers(model.folder))


def runs_vllm() -> bool:
    """Whether `auto` may be vLLM on this machine."""
    return vllm_build.device() == "cuda"


def vllm_loads(rung: str, device: Device) -> bool:
    """Whether vLLM keeps to a `model.rung`: its adapters are computed in 16 bits on a GPU, in fp32 on a CPU."""
    return rung in ("auto", _vllm_rung(device))


def check_rung(rung: str, device: Device) -> None:
    """Raise ConfigError for a `model.rung` that vLLM would pass over in silence."""
    if not vllm_loads(rung, device):
        where = "a GPU" if device == "cuda" else "a CPU"
        raise ConfigError(
            f"key model.rung: {rung!r}; allowed where vLLM answers on {where}: auto, {_vllm_rung(device)}; others with "
            "model.engine: transformers"
        )


def _vllm_rung(device: Device) -> RungName:
    return "bf16" if device == "cuda" else "fp32"


def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def is_worth_vllm(weight_bytes: float) -> bool:
    """Whether a model is so large that its answers may win back what a start of vLLM's process takes."""
    return weight_bytes >= _WORTH_BYTES


def _suits_vllm(settings: Settings, model: ModelFiles) -> bool:
    from agentlab.inference.vllm_settings import model_sizes

    try:
        sizes = model_sizes(model.folder, 2)
        if not is_worth_vllm(sizes.weight_bytes):
            return False
        vllm_settings(settings, sizes, _card_limit(settings))
    except (OutOfMemoryError, ModelError, AttributeError, ValueError):
        return False  # also a model whose config names its sizes otherwise: transformers can load more kinds
    return True


def vllm_settings(settings: Settings, sizes: "ModelSizes", limit_bytes: float) -> "VllmSettings":
    """What vLLM is started with on a GPU of which so much may be taken. Raises OutOfMemoryError where nothing fits."""
    from agentlab.inference.vllm_settings import settings_for_gpu

    return settings_for_gpu(limit_bytes / GIB, sizes, served_rank(settings), context_gib=settings.budget.context_gib)


def beside_learner(settings: Settings, card_bytes: float | None = None) -> Settings:
    """The settings for a vLLM that scores a run: who trains in between keeps CUDA's context when its model is gone.

    card_bytes: the memory of a card; None: of this machine's.
    """
    budget = settings.budget
    limit = _card_limit(settings) if card_bytes is None else min(budget.vram_gib * GIB, card_bytes)
    left = limit / GIB - budget.context_gib
    return settings.model_copy(update={"budget": budget.model_copy(update={"vram_gib": left})})


def beside_sleeping(settings: Settings, asleep_bytes: int) -> Settings:
    """The settings for a model that is loaded while vLLM sleeps and keeps so much of the GPU."""
    budget = settings.budget
    context = budget.context_gib + asleep_bytes / GIB
    return settings.model_copy(update={"budget": budget.model_copy(update={"context_gib": context})})


def served_rank(settings: Settings) -> int:
    """The largest rank that an adapter of this experiment can have."""
    return max(settings.lora.rank, settings.mutation.max_rank)


def open_engine(
    settings: Settings, model: ModelFiles, engine: EngineName | None = None, rung: RungName | None = None,
    on_cpu: bool = False,
) -> Engine:  # fmt: skip
    """Load `model` on the engine that the settings ask for, or on this one.

    openai: `model` is only a name (`served_model`). rung: instead of the one that the settings ask for; vLLM has its
    own, and a run that it scores may be trained at another. on_cpu: there although there is a GPU, if the free RAM
    allows it. Raises ModelError, EngineError, OutOfMemoryError, ConfigError for a rung that vLLM does not load.
    """
    name = engine or choose_engine(settings, model)
    if name == "openai":
        from agentlab.inference.openai_engine import open_server

        tokenizer = settings.model.tokenizer
        return open_server(settings.model, model.name, None if tokenizer is None else resolve(tokenizer).folder)
    stored.check_rung(model, settings.model.rung)
    if name == "vllm":
        check_rung(settings.model.rung, vllm_build.required())
        from agentlab.inference.vllm_engine import VllmEngine

        budget = settings.budget
        return VllmEngine(
            model, budget.vram_gib, rank=served_rank(settings), context_gib=budget.context_gib, threads=budget.threads
        )
    from agentlab.inference.transformers_engine import TransformersEngine

    device: Device = "cpu" if on_cpu or not _has_cuda() else "cuda"
    if on_cpu:
        _check_swap(settings, model)
        _check_stored_ram(settings, model)
    if rung is not None and on_cpu:
        _check_ram(settings, model, rung)
    wanted = rung or choose_rung(settings, model, device, moved=on_cpu)
    # of a card that has less than the budget, all; the driver's context is not the allocator's
    allowed = _card_limit(settings) / GIB - settings.budget.context_gib
    return TransformersEngine(model, allowed, rung=wanted or "auto", device=device)


def choose_rung(settings: Settings, model: ModelFiles, device: Device, moved: bool = False) -> RungName | None:
    """The rung to load `model` at for answering; None: as it is stored, or where nobody knows its sizes.

    `auto` is fp32 on a CPU; on a GPU, and for a model that was moved to the CPU, the most precise rung that fits, and
    the smallest where none does. Raises OutOfMemoryError where a moved model fits into the free RAM at no rung: what
    the kernel would swap or kill for it is worth more than a slow answer.
    """
    planned = planned_footprint(settings, model, device)
    if settings.model.rung != "auto" and not moved:
        return settings.model.rung
    if planned is None or (device == "cpu" and not moved):
        return None
    if device == "cuda":
        fitting = (rung.name for rung in LADDER if _serves(settings, model, rung))
    else:
        fitting = (name for name in planned.rung_bytes if _least_bytes(planned, name) <= _ram_limit(settings))
    if (found := next(fitting, None)) is not None:
        return found
    smallest = min(planned.rung_bytes, key=lambda name: planned.rung_bytes[name])
    if moved and device == "cpu":
        _check_ram(settings, model, smallest, NoRoomElsewhereError)
    return smallest


def _serves(settings: Settings, model: ModelFiles, rung: Rung) -> bool:
    """Whether a model fits on the GPU at a rung to answer, by the plan."""
    shape, card = ModelShape.read(model.folder / "config.json", model.name), gpus()[:1]
    here = Machine("cuda", 0, int(_card_limit(settings)), capability=card[0].compute_capability if card else None)
    one = Model("primary", model.name, shape, origin="")
    return phases_of(settings, one, here, Workload(0, 0, 0, 0, 0, 0), rung, trained=False)[0].fits


def _card_limit(settings: Settings) -> float:
    """Bytes of the card that may be taken: the budget, or all of a card that has less."""
    card = gpus()[:1]  # the one that torch runs on
    has = (card[0].memory_total_mb if card else None) or float("inf")
    return min(settings.budget.vram_gib * GIB, has * 2**20)


def _ram_limit(settings: Settings) -> float:
    """Bytes of RAM that a model may take; 0 where nobody can read what is free."""
    return settings.budget.ram_fraction * memory_stats().cpu_free * 2**20


def _check_swap(settings: Settings, model: ModelFiles) -> None:
    """Raise NoRoomElsewhereError on a machine that swaps so much that a model more would not help."""
    used, limit = memory_stats().swap_used / 1024, settings.budget.swap_gib
    if used > limit:
        raise NoRoomElsewhereError(
            f"{model.name} is not moved to the CPU while {used:.1f} GiB of swap are in use; allowed: up to "
            f"budget.swap_gib {limit:g}"
        )


def _check_ram(
    settings: Settings, model: ModelFiles, rung: RungName, kind: type[OutOfMemoryError] = OutOfMemoryError
) -> None:
    """Raise an error of this kind where the ledger says that `model` does not fit into the free RAM at `rung`."""
    planned = planned_footprint(settings, model, "cpu")
    if planned is not None:
        _check_bytes(settings, model, f"at {rung}", _least_bytes(planned, rung), kind)


def _check_stored_ram(settings: Settings, model: ModelFiles) -> None:
    """As `_check_ram`, for a model that is quantized in its files."""
    if stored.stored_quantization(model.folder) is not None:
        _check_bytes(settings, model, "as stored", ledger.stored_weight_bytes(model.folder), NoRoomElsewhereError)


def _least_bytes(planned: Footprint, rung: RungName) -> int:
    return planned.rung_bytes[rung] + LEAST_TOKENS * planned.bytes_per_token


def _check_bytes(settings: Settings, model: ModelFiles, how: str, needed: int, kind: type[OutOfMemoryError]) -> None:
    limit = _ram_limit(settings)
    if limit and needed > limit:
        raise kind(
            f"{model.name} takes {needed / 2**20:.1f} MiB of RAM {how}; allowed: {limit / 2**20:.1f}, "
            f"budget.ram_fraction {settings.budget.ram_fraction:g} of what is free"
        )


def planned_footprint(settings: Settings, model: ModelFiles, device: Device) -> Footprint | None:
    """What the transformers engine will hold when it is opened; None for a model whose rung cannot be changed."""
    try:
        shape = ModelShape.read(model.folder / "config.json", model.name)
    except ShapeError:
        return None
    if shape.prequantized is not None:
        return None
    sizes: dict[RungName, int] = {
        rung.name: ledger.weights(shape, rung, element_bytes(rung.name, device)).total for rung in (FP32, *LADDER)
    }
    wanted = settings.model.rung
    usual: RungName = wanted if wanted != "auto" else "fp32" if device == "cpu" else "bf16"
    token_bytes = ledger.kv_bytes_per_token(shape, element_bytes(usual, device))
    return Footprint(device, shape.context_length, token_bytes, usual, sizes)


def served_model(name: str) -> ModelFiles:
    """A model that is only a name on a server."""
    return ModelFiles(name, Path(), "")
