"""A base model that stays in memory, and the adapters beside it: what training and answering share."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentlab import adapters
from agentlab.adapters import Lora
from agentlab.errors import AdapterError, ModelError
from agentlab.inference import attention
from agentlab.inference.accounting import account_for
from agentlab.inference.templates import TemplatedEngine
from agentlab.models import ModelFiles


class ResidentModel(TemplatedEngine):
    """A base model in fp32 on the CPU or bf16/fp16 on a GPU, and LoRA adapters injected into it.

    Learning trains its adapters; a subclass answers with them.
    """

    def __init__(self, model: ModelFiles, vram_gib: float | None = None) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model_files = model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32
        if self.device == "cuda":
            dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
            total = torch.cuda.get_device_properties(0).total_memory
            if vram_gib is not None:  # WSL2 spills into RAM instead of failing: the allocator has to refuse
                torch.cuda.set_per_process_memory_fraction(min(1.0, vram_gib * 2**30 / total))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model.folder, padding_side="left")
            base = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(self.device).eval()
            if self.device == "cpu" and base.config._attn_implementation == "sdpa":
                base.set_attn_implementation(attention.register())
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{model.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{model.name} has no chat template; choose an instruct model")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        base.requires_grad_(False)
        self._base: Any = base
        self._peft: PeftModel | None = None  # wraps the same base while any adapter is injected
        self._plain: dict[str, Lora] = {}  # adapters that answer from the base's own weights
        self._sums: tuple[str, list[tuple[torch.nn.Parameter, torch.Tensor]]] | None = None  # of the last one used
        account_for(self)

    # -- adapters -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model to call: wrapped by PEFT while adapters are injected."""
        return self._base if self._peft is None else self._peft

    @property
    def base(self) -> Any:
        """The bare base model, into which PEFT injects adapters that are trained or cannot be added to the weights."""
        return self._base

    def parameters(self) -> int:
        """Number of weights of the base model."""
        return sum(p.numel() for n, p in self._base.named_parameters() if "lora_" not in n)

    def adapter_bytes(self) -> int:
        """Bytes of all loaded adapters, and of the weights to which one is added."""
        factors = [p for name, p in self._base.named_parameters() if "lora_" in name]
        factors += [value for lora in list(self._plain.values()) for pair in lora.modules.values() for value in pair]
        factors += [] if self._sums is None else [total for _, total in self._sums[1]]
        return sum(value.numel() * value.element_size() for value in factors)

    def load_adapter(self, adapter: str, folder: Path) -> None:
        lora = adapters.load(folder)  # refuses what is damaged, hostile or cannot be computed correctly
        self.unload_adapter(adapter)
        if self._fits_into_weights(adapter, lora):
            self._plain[adapter] = lora
        else:
            self.add_adapter(adapter, lora)

    def _fits_into_weights(self, adapter: str, lora: Lora) -> bool:
        """Whether the deltas can be added to the weights: fp32, dense, linear, nobody else's. Raises AdapterError."""
        if self._base.dtype != torch.float32 or getattr(self._base, "is_quantized", False):
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
        except ValueError as error:
            raise AdapterError(f"adapter {adapter} does not fit {self.model_files.name}: {error}") from None

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
        return sorted([*self._plain, *([] if self._peft is None else self._peft.peft_config)])

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Let `model` answer with this adapter, or with none."""
        if adapter is not None and adapter not in self.adapters():
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")
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
