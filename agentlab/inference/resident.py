"""A base model that stays in memory, and the adapters beside it: what training and answering share."""

import contextlib
import functools
import gc
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoTokenizer

from agentlab import adapters
from agentlab.adapters import Lora
from agentlab.config import RungName
from agentlab.errors import AdapterError, ModelError, first_line
from agentlab.hardware import ledger
from agentlab.hardware.oom import let_go
from agentlab.hardware.rungs import FP32, LADDER, element_bytes
from agentlab.hardware.shape import ModelShape, ShapeError
from agentlab.inference import attention, loading
from agentlab.inference.accounting import account_for
from agentlab.inference.contract import EngineBroken, EngineError
from agentlab.inference.stored import stored_quantization
from agentlab.inference.templates import TemplatedEngine
from agentlab.models import ModelFiles


class ResidentModel(TemplatedEngine):
    """A base model at one rung, and LoRA adapters beside it.

    Learning trains its adapters; a subclass answers with them. rung: the precision of the weights; None for a model
    that is quantized in its files.
    """

    def __init__(
        self, model: ModelFiles, vram_gib: float | None = None, rung: RungName | Literal["auto"] = "auto",
        device: Literal["auto", "cuda", "cpu"] = "auto",
    ) -> None:  # fmt: skip
        """vram_gib: what torch's allocator may take of the card, None: all of it. rung auto: fp32 on a CPU, 16 bits on
        a GPU, as stored for a model that is quantized in its files.

        Raises ModelError, OutOfMemoryError.
        """
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model_files = model
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if self.device == "cuda" and vram_gib is not None:
            # WSL2 spills into RAM instead of failing: the allocator has to refuse
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, vram_gib * 2**30 / total)))
        with _naming(f"{model.folder} cannot be loaded: config.json"):
            AutoConfig.from_pretrained(model.folder)
        with _naming(f"the tokenizer of {model.folder} cannot be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(model.folder, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{model.name} has no chat template; choose an instruct model")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.rung: RungName | None = self._rung_of(rung)
        self._base: Any = self._loaded(self.rung)
        self._peft: PeftModel | None = None  # wraps the same base while any adapter is injected
        self._plain: dict[str, Lora] = {}  # adapters that answer from the base's own weights
        self._parked: dict[str, Lora] = {}  # in RAM only, until a request asks for one
        self._sums: tuple[str, list[tuple[torch.nn.Parameter, torch.Tensor]]] | None = None  # of the last one used
        account_for(self)

    def _rung_of(self, wanted: RungName | Literal["auto"]) -> RungName | None:
        if wanted != "auto":
            return wanted
        if stored_quantization(self.model_files.folder) is not None:
            return None
        return "bf16" if self.device == "cuda" else "fp32"

    def _loaded(self, rung: RungName | None) -> Any:
        base = loading.load_base(self.model_files, rung, self.device)
        if self.device == "cpu" and base.config._attn_implementation == "sdpa":
            base.set_attn_implementation(attention.register())
        return base

    # -- the base -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _shape(self) -> ModelShape | None:
        """The model's sizes; None for a kind that the ledger does not know."""
        try:
            return ModelShape.read(self.model_files.folder / "config.json", self.model_files.name)
        except ShapeError:
            return None

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the KV cache and of what is not quantized."""
        return element_bytes(self.rung, self.device)

    def rung_bytes(self) -> dict[RungName, int]:
        """The base's bytes at each rung that it can be loaded at here, by the ledger; empty where nobody knows them."""
        if self._shape is None or self.rung is None:
            return {}
        names = [one for one in (FP32, *LADDER) if one.name != "hqq3" or importlib.util.find_spec("hqq")]
        return {one.name: ledger.weights(self._shape, one, element_bytes(one.name, self.device)).total for one in names}

    def change_rung(self, rung: RungName, room_bytes: int = 0) -> int:
        """Load the base anew at another rung, adapters and all; the bytes that it saves, negative for what it takes.

        The old base is freed first. Raises EngineError, and changes nothing, unless the ledger says that the new one
        takes fewer bytes, or at most `room_bytes` more. Raises OutOfMemoryError or ModelError where it cannot be
        loaded: then the base is what it was, or gone where not even that can be loaded again.
        """
        self._check_open()
        sizes = self.rung_bytes()
        if self.rung is None or rung not in sizes:
            raise EngineError(
                f"{self.model_files.name} cannot be loaded at rung {rung}; allowed: {', '.join(sizes) or 'as stored'}"
            )
        saved = sizes[self.rung] - sizes[rung]
        if saved <= 0 and -saved > room_bytes:
            raise EngineError(
                f"rung {rung} saves nothing: {self.model_files.name} takes {sizes[rung] / ledger.MIB:.1f} MiB at it, "
                f"{sizes[self.rung] / ledger.MIB:.1f} at {self.rung}; allowed: a rung that takes fewer bytes, or "
                f"room_bytes of {-saved} or more"
            )
        if rung == self.rung:
            return 0
        before, kept = self.rung, self._taken_out()
        self._base = None
        self._collect()
        try:
            self._base, self.rung = self._loaded(rung), rung
        except Exception as error:
            let_go(error)  # what was loaded of the new one
            self._collect()
            self._base = self._loaded(before)
            raise
        finally:
            if self._base is not None:
                self._parked |= kept  # each is put beside the base when it is asked for
        return saved

    def _check_open(self) -> None:
        """Raise EngineBroken for one that was closed, or whose base could not be loaded again."""
        if self._base is None:
            raise EngineBroken(f"the model {self.model_files.name} is gone, or was closed; open the engine again")

    def _taken_out(self) -> dict[str, Lora]:
        """All adapters as values in RAM, and none beside the base any more."""
        found = {**self._parked, **self._plain}
        for adapter in [] if self._peft is None else list(self._peft.peft_config):
            found[adapter] = self.read_adapter(adapter)
        for adapter in found:
            self.unload_adapter(adapter)
        return found

    def make_room(self) -> None:
        """Give up what is held only to be faster, as before training."""
        self._collect()

    def _collect(self) -> None:
        """Give freed memory back to whoever needs it."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    # -- adapters -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model to call: wrapped by PEFT while adapters are injected."""
        return self._base if self._peft is None else self._peft

    @property
    def base(self) -> Any:
        """The bare base model, into which PEFT injects adapters that are trained or cannot be added to the weights."""
        return self._base

    @property
    def capability(self) -> tuple[int, int] | None:
        """The GPU's compute capability; None without one."""
        return torch.cuda.get_device_capability() if torch.cuda.is_available() else None

    def parameters(self) -> int:
        """Number of weights of the base model."""
        return loading.weight_count(self._base)

    def adapter_bytes(self) -> int:
        """Bytes of all loaded adapters, and of the weights to which one is added."""
        factors = [p for name, p in self._base.named_parameters() if "lora_" in name]
        factors += [value for lora in list(self._plain.values()) for pair in lora.modules.values() for value in pair]
        factors += [] if self._sums is None else [total for _, total in self._sums[1]]
        return sum(value.numel() * value.element_size() for value in factors)

    def load_adapter(self, adapter: str, folder: Path) -> None:
        lora = adapters.load(folder)  # refuses what is damaged, hostile or cannot be computed correctly
        old = self._held(adapter) if adapter in self.adapters() else None
        self.unload_adapter(adapter)
        try:
            self._place(adapter, lora)
        except BaseException:
            self.unload_adapter(adapter)  # what there is of it
            if old is not None:
                self._parked[adapter] = old  # takes no room on the device until it is asked for
            raise

    def _held(self, adapter: str) -> Lora:
        """The weights of a loaded adapter, wherever they are."""
        found = self._plain.get(adapter) or self._parked.get(adapter)
        return self.read_adapter(adapter) if found is None else found

    def _place(self, adapter: str, lora: Lora) -> None:
        if self._fits_into_weights(adapter, lora):
            self._plain[adapter] = lora
        else:
            self.add_adapter(adapter, lora)

    def offload_adapters(self, keep: str | None = None) -> int:
        """Move all adapters but one into RAM, to come back when a request asks for one; the bytes that this frees."""
        freed = self._adapter_bytes(keep)[1]
        if self._sums is not None and self._sums[0] != keep:
            self._sums = None
        for adapter in self._beside(keep):
            lora = self._held(adapter)
            self.unload_adapter(adapter)
            self._parked[adapter] = lora
        self._collect()
        return freed

    def recall_adapters(self) -> None:
        """Bring all adapters that were moved into RAM back beside the base."""
        for adapter in list(self._parked):
            self._unpark(adapter)

    def _unpark(self, adapter: str) -> None:
        lora = self._parked[adapter]
        self._place(adapter, lora)  # where this fails it stays in RAM
        self._parked.pop(adapter, None)

    def _beside(self, keep: str | None) -> list[str]:
        """Adapters that take memory beside the base, but for `keep`: injected ones, and the sums of the last used."""
        injected = [] if self._peft is None else list(self._peft.peft_config)
        summed = [] if self._sums is None else [self._sums[0]]
        return [adapter for adapter in (*injected, *summed) if adapter != keep]

    def _adapter_bytes(self, keep: str | None) -> tuple[int, int]:
        """(number, bytes) of what `offload_adapters` would move or drop."""
        names = self._beside(keep)
        size = sum(
            p.numel() * p.element_size()
            for name, p in self._base.named_parameters()
            if "lora_" in name and any(f".{adapter}." in name for adapter in names)
        )
        if self._sums is not None and self._sums[0] != keep:
            size += sum(summed.numel() * summed.element_size() for _, summed in self._sums[1])
        return len(names), size

    def _fits_into_weights(self, adapter: str, lora: Lora) -> bool:
        """Whether the deltas can be added to the weights: fp32, dense, linear, nobody else's. Raises AdapterError."""
        if self.rung != "fp32":
            return False  # in 16 bits the sum would round small changes away
        for name, (a, b) in lora.modules.items():
            linear = self._linear(name)
            if linear is None:
                self._refuse_unless_there(adapter, name)
                return False
            self._check_shapes(adapter, name, a, b, linear.in_features, linear.out_features)
        return True

    def _linear(self, name: str) -> torch.nn.Linear | None:
        try:
            module = self._base.get_submodule(name)
        except AttributeError:
            return None
        module = getattr(module, "base_layer", module)  # PEFT's layer around it, while something is trained
        tied = getattr(module, "weight", None) is self._base.get_input_embeddings().weight  # the head's, in many models
        return module if type(module) is torch.nn.Linear and not tied else None

    def _refuse_unless_there(self, adapter: str, name: str) -> None:
        if name not in dict(self._base.named_modules()):
            raise AdapterError(f"adapter {adapter} does not fit {self.model_files.name}: no module {name}")

    def _check_shapes(
        self, adapter: str, name: str, a: torch.Tensor, b: torch.Tensor, in_features: int, out_features: int
    ) -> None:
        """a: (rank, in), b: (out, rank)."""
        for value, needed in ((a, (a.shape[0], in_features)), (b, (out_features, b.shape[1]))):
            if tuple(value.shape) != needed:
                raise AdapterError(
                    f"adapter {adapter} does not fit {self.model_files.name}: {name} has shape "
                    f"{tuple(value.shape)}, the model needs {needed}"
                )

    def add_adapter(self, adapter: str, lora: Lora, trainable: bool = False) -> None:
        """Inject in-memory LoRA weights under an id. Raises AdapterError when they do not fit the base model."""
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=sorted(lora.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
            inference_mode=not trainable,
            init_lora_weights=False,  # they are overwritten below
        )
        self._add_config(adapter, config)
        own = {name: module for name, module in self._base.named_modules() if hasattr(module, "lora_A")}
        missing = set(lora.modules) - set(own)
        if missing:
            self.unload_adapter(adapter)
            raise AdapterError(
                f"adapter {adapter} does not fit {self.model_files.name}: no module {sorted(missing)[0]}"
            )
        try:
            for name, module in own.items():
                a, b = lora.modules.get(name, (None, None))
                for parameter, value in ((module.lora_A, a), (module.lora_B, b)):
                    weight = parameter[adapter].weight
                    if value is None:
                        weight.data.zero_()
                    elif weight.shape != value.shape:
                        raise AdapterError(
                            f"adapter {adapter} does not fit {self.model_files.name}: {name} has shape "
                            f"{tuple(value.shape)}, the model needs {tuple(weight.shape)}"
                        )
                    else:
                        weight.data.copy_(value)
        except AdapterError:
            self.unload_adapter(adapter)
            raise
        for name, parameter in self._base.named_parameters():
            parameter.requires_grad_(trainable and f".{adapter}." in name)

    def new_adapter(self, adapter: str, config: LoraConfig) -> None:
        """Inject freshly initialised, trainable LoRA weights (B = 0: the model is unchanged)."""
        self._add_config(adapter, config)
        for name, parameter in self._base.named_parameters():
            parameter.requires_grad_(f".{adapter}." in name)

    def _add_config(self, adapter: str, config: LoraConfig) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self._peft is None:
                    self._peft = get_peft_model(self._base, config, adapter_name=adapter)
                else:
                    self._peft.add_adapter(adapter, config)
            self._peft.eval()  # injected layers come in training mode: their dropout would blur every answer
        except BaseException as error:
            self._take_out(adapter)
            if isinstance(error, ValueError):
                raise AdapterError(f"adapter {adapter} does not fit {self.model_files.name}: {error}") from None
            raise

    def _take_out(self, adapter: str) -> None:
        """Undo an injection that failed half-way: layers that are there already would answer with random weights."""
        for name, layer in list(self._base.named_modules()):
            if not isinstance(layer, BaseTunerLayer):
                continue
            if self._peft is None:
                self._base.set_submodule(name, layer.get_base_layer())
            else:
                layer.delete_adapter(adapter)

    def activate(self, adapter: str) -> None:
        """Make one adapter the active and only trainable one."""
        if self._peft is None:
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: none")
        self._peft.set_adapter(adapter)

    def read_adapter(self, adapter: str) -> Lora:
        """The weights of a loaded adapter as fp32 copies on the CPU."""
        if self._peft is None or adapter not in self._peft.peft_config:
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")
        config = self._peft.peft_config[adapter]
        modules = {
            name: (
                module.lora_A[adapter].weight.detach().float().cpu().clone(),
                module.lora_B[adapter].weight.detach().float().cpu().clone(),
            )
            for name, module in self._base.named_modules()
            if hasattr(module, "lora_A") and adapter in module.lora_A
        }
        return Lora(
            modules=modules,
            rank=config.r,
            alpha=float(config.lora_alpha),
            dropout=float(config.lora_dropout),
            target_modules=sorted(config.target_modules),
            base_model=self.model_files.name,
        )

    def unload_adapter(self, adapter: str) -> None:
        self._plain.pop(adapter, None)
        self._parked.pop(adapter, None)
        if self._sums is not None and self._sums[0] == adapter:
            self._sums = None
        if self._peft is None or adapter not in self._peft.peft_config:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(self._peft.peft_config) == 1:
                self._base = self._peft.unload()  # the last one: give the plain layers back
                self._peft = None
            else:
                self._peft.delete_adapter(adapter)

    def adapters(self) -> list[str]:
        return sorted([*self._plain, *self._parked, *([] if self._peft is None else self._peft.peft_config)])

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Let `model` answer with this adapter, or with none."""
        if adapter is not None and adapter not in self.adapters():
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")
        if adapter in self._parked:
            self._unpark(adapter)
        if adapter is None or adapter in self._plain:
            with contextlib.ExitStack() as stack:
                if self._peft is not None:
                    stack.enter_context(self._peft.disable_adapter())
                if adapter is not None:
                    stack.enter_context(self._added_to_weights(adapter))
                yield
        elif self._peft is not None:
            self._peft.set_adapter(adapter, inference_mode=True)
            yield

    @contextlib.contextmanager
    def _added_to_weights(self, adapter: str) -> Iterator[None]:
        """The base with the adapter's deltas in its weights: a token costs what it costs without an adapter.

        The base's own tensors are put back as they were; nothing is subtracted again.
        """
        own: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if self._sums is None or self._sums[0] != adapter:
            self._sums = None  # two at once would be memory for nothing
            self._sums = adapter, self._sum(self._plain[adapter])
        try:
            for weight, summed in self._sums[1]:
                own.append((weight, weight.data))
                weight.data = summed
            yield
        finally:
            for weight, data in own:
                weight.data = data

    def _sum(self, lora: Lora) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Each weight that the adapter changes, and the base's plus B·A·alpha/rank; kept for the next answer."""
        summed = []
        for name in lora.modules:
            linear = self._linear(name)
            assert linear is not None
            with torch.no_grad():
                summed.append((linear.weight, linear.weight.data + adapters.delta(lora, name).to(self.device)))
        return summed


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Raise ModelError, beginning with `what`, for the many kinds of errors that libraries raise about a file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: {first_line(error)}") from error
