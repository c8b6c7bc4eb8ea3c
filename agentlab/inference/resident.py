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
from agentlab.errors import AdapterError, ModelError
from agentlab.inference import attention
from agentlab.inference.accounting import account_for
from agentlab.inference.contract import Engine
from agentlab.models import ModelFiles


class ResidentModel(Engine):
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
        self._peft: PeftModel | None = None  # wraps the same base while any adapter is loaded
        account_for(self)

    # -- adapters -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The model to call: wrapped by PEFT while adapters are loaded."""
        return self._base if self._peft is None else self._peft

    @property
    def base(self) -> Any:
        """The bare base model (PEFT injects its layers into it while adapters are loaded)."""
        return self._base

    def parameters(self) -> int:
        """Number of weights of the base model."""
        return sum(p.numel() for n, p in self._base.named_parameters() if "lora_" not in n)

    def load_adapter(self, adapter: str, folder: Path) -> None:
        lora = adapters.load(folder)  # refuses what is damaged, hostile or cannot be computed correctly
        self.unload_adapter(adapter)
        self.add_adapter(adapter, lora)

    def add_adapter(self, adapter: str, lora: "adapters.Lora", trainable: bool = False) -> None:
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

    def read_adapter(self, adapter: str) -> "adapters.Lora":
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
        return adapters.Lora(
            modules=modules,
            rank=config.r,
            alpha=float(config.lora_alpha),
            dropout=float(config.lora_dropout),
            target_modules=sorted(config.target_modules),
            base_model=self.model_files.name,
        )

    def unload_adapter(self, adapter: str) -> None:
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
        return [] if self._peft is None else sorted(self._peft.peft_config)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Let `model` answer with this adapter, or with none."""
        if adapter is not None and adapter not in self.adapters():
            raise AdapterError(f"adapter {adapter} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")
        if self._peft is None:
            yield
        elif adapter is None:
            with self._peft.disable_adapter():
                yield
        elif self._base.dtype == torch.float32 and not getattr(self._base, "is_quantized", False):
            with self._added_to_weights(adapter), self._peft.disable_adapter():
                yield
        else:  # in 16 bits the sum would round small changes away
            self._peft.set_adapter(adapter, inference_mode=True)
            yield

    @contextlib.contextmanager
    def _added_to_weights(self, adapter: str) -> Iterator[None]:
        """The base with the adapter's deltas in its weights: a token costs what it costs without an adapter.

        The base's own tensors are kept and put back, bit for bit; nothing is subtracted again.
        """
        own: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        try:
            with torch.no_grad():
                for module in self._base.modules():
                    if adapter in getattr(module, "lora_A", ()):
                        weight = module.base_layer.weight
                        own.append((weight, weight.data))
                        weight.data = weight.data + module.get_delta_weight(adapter)
            yield
        finally:
            for weight, data in own:
                weight.data = data
