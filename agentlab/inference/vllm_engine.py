"""The engine on vLLM, which runs in a child process: one batch holds any mix of adapters."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentlab import adapters as adapter_room
from agentlab.adapters import Lora
from agentlab.errors import AdapterError, ModelError
from agentlab.hardware import compiler, monitor
from agentlab.hardware.meter import ram_peak_mib
from agentlab.inference import vllm_build
from agentlab.inference.accounting import account_for_child
from agentlab.inference.contract import EngineBroken, EngineError, OutOfMemoryError, Request
from agentlab.inference.stored import check_vllm, stored_quantization
from agentlab.inference.templates import as_list
from agentlab.inference.token_stream import News, TokenStreamEngine
from agentlab.inference.vllm_modules import Modules
from agentlab.inference.vllm_process import broken, environment, error_of, not_started
from agentlab.inference.vllm_settings import (
    CONTEXT_GIB,
    VllmSettings,
    model_sizes,
    note_of_free,
    planned_bytes,
    settings_for_cpu,
    settings_for_free,
)
from agentlab.inference.worker_process import ChildDied, ChildProcess, Message
from agentlab.models import ModelFiles

START_S = 600.0  # a large model from a slow disk, and kernels compiled for the first time
SILENCE_S = 300.0  # without a sign of life while requests are out; far longer than any step takes
_CALL_S = 120.0
_WAIT_S = 0.05
_CANARY_TOKENS = 16
_REHEARSAL = "rehearsal"
_CANARY = [{"role": "user", "content": "Name the months of the year."}]


@dataclasses.dataclass(frozen=True)
class _Loaded:
    number: int  # vLLM's id; a fresh one for each load, because vLLM keeps what it knows under an old one
    folder: Path

    def message(self, adapter: str) -> list[Any]:
        return [f"{adapter}-{self.number}", self.number, str(self.folder)]


class VllmEngine(TokenStreamEngine):
    """Answers with vLLM in a child process, which is started here and killed by `close`.

    Adapters have three tiers: `settings.max_loras` on the device, `settings.max_cpu_loras` in RAM, all on disk.
    """

    name = "vllm"
    _allowed: float | None = None  # the share of the GPU's memory that its allocator may take

    def __init__(
        self,
        model: ModelFiles,
        vram_gib: float | None = None,
        settings: VllmSettings | None = None,
        rank: int = 64,
        adapters: int = 4,
        context_gib: float = CONTEXT_GIB,
        threads: int | None = None,
    ) -> None:
        """settings: None makes them from the budget for `adapters` of up to `rank` on the device at once, of which
        `context_gib` are CUDA's own. threads: at most so many compute on a CPU; None: vLLM's choice, one per core.

        Raises ModelError, OutOfMemoryError where the budget or the device is too small, EngineError otherwise.
        """
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        from agentlab.inference.loading import has_bf16

        self._child: ChildProcess | None = None
        self._asleep = False
        self._threads = threads
        self.model_files = model
        self.device = vllm_build.required()
        check_vllm(model)
        packed = stored_quantization(model.folder) is not None
        self._dtype = "bfloat16" if packed else "float32"  # its kernels for packed weights know 16 bits alone
        if self.device == "cuda":
            self._dtype = "bfloat16" if has_bf16() else "float16"
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model.folder)
            self._config: Any = AutoConfig.from_pretrained(model.folder).get_text_config()
            with contextlib.suppress(OSError):  # a folder without a generation config ends where its tokenizer says
                self._generation = GenerationConfig.from_pretrained(model.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{model.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        if self.tokenizer.chat_template is None:
            raise ModelError(f"{model.name} has no chat template; choose an instruct model")
        self.sizes = model_sizes(model.folder, 4 if self._dtype == "float32" else 2)
        if self.device == "cuda":
            if missing := compiler.missing():
                raise ModelError(
                    f"vLLM compiles its kernels for a GPU, for which {missing} is missing; {compiler.REMEDY}"
                )
            self._total_gib = monitor.torch_total_gib()
            if vram_gib is not None:
                self._allowed = (min(vram_gib, self._total_gib) - context_gib) / self._total_gib
        self.settings = settings or self._fitting(vram_gib, rank, adapters, context_gib)
        self._modules = Modules(model, self.sizes.shape)
        self._scratch = Path(tempfile.mkdtemp(prefix="agentlab-vllm-"))
        self._loaded: dict[str, _Loaded] = {}
        self._pinned: set[str] = set()
        self._numbers = 0
        self._nothing: _Loaded | None = None
        self._keys = 0
        self._heard_s = 0.0  # when the process gave its last sign of life, or was asked something
        self._pending: deque[News] = deque()
        self._canary: dict[str | None, list[int]] = {}
        try:
            # Base requests go out with an adapter of zeros on a CPU while others are loaded: vLLM's CPU kernels read
            # "no adapter", -1, as an index, and in a mixed batch the base would get the last slot's
            # (vllm-project/vllm#48421).
            if self.device == "cpu" and (nothing := self._modules.without_effect()) is not None:
                self._nothing = self._save(nothing)
            self._start()
            account_for_child(self)
        except BaseException:
            self.close()
            raise

    def _fitting(self, vram_gib: float | None, rank: int, adapters: int, context_gib: float) -> VllmSettings:
        """Settings that fit the budget, and on a GPU what is free of it; then `note` says so."""
        if self.device == "cpu":
            return settings_for_cpu(self.sizes, rank, adapters)
        budget_gib, free_gib = min(vram_gib or self._total_gib, self._total_gib), monitor.free_gib()
        found = settings_for_free(budget_gib, free_gib, self.sizes, rank, adapters, context_gib=context_gib)
        self.note = note_of_free(budget_gib, free_gib, found)
        return found

    def _save(self, lora: Lora) -> _Loaded:
        """A private copy under a fresh number: vLLM reads what was checked, not what a folder may hold by then."""
        self._numbers += 1
        loaded = _Loaded(self._numbers, self._scratch / f"adapter-{self._numbers}")
        adapter_room.save(lora, loaded.folder)
        return loaded

    # -- the child ----------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, Any]:
        """What vLLM's EngineArgs takes."""
        mine = dataclasses.asdict(self.settings)
        if self.device == "cuda":
            # vLLM starts only where so much is free beside its context; by default it asks for nearly all
            wanted = planned_bytes(self.settings, self.sizes) - self.settings.outside_bytes
            mine["gpu_memory_utilization"] = min(0.95, wanted / 2**30 / self._total_gib)
        if self._nothing is not None:  # it takes a slot
            mine |= {"max_loras": self._slots, "max_cpu_loras": self.settings.max_cpu_loras + 1}
        return {
            **{name: value for name, value in mine.items() if name not in ("sleep_mode", "outside_bytes")},
            "model": str(self.model_files.folder),
            "dtype": self._dtype,
            "enable_lora": True,
            # without the head: its slots would be as wide as the vocabulary, and prompts could not be scored
            "lora_target_modules": sorted(self._modules.targets),
            "enable_sleep_mode": self._device_sleeps,
            "generation_config": "vllm",  # not the model's own sampling defaults: a request says what it wants
            "disable_log_stats": True,
            "seed": 0,
        }

    @property
    def is_running(self) -> bool:
        """Whether the process is there and awake."""
        return self._child is not None and not self._asleep

    @property
    def _device_sleeps(self) -> bool:
        return self.device == "cuda" and self.settings.sleep_mode

    def _start(self) -> None:
        self._child = ChildProcess("agentlab.inference.vllm_worker", environment(self.device, self._threads))
        try:
            self._child.send({"start": self._arguments(), "allowed": self._allowed})
            answer = self._child.receive(START_S)
        except ChildDied as died:
            self._kill()
            text = f"vLLM cannot load {self.model_files.name}: the process {died}"
            raise not_started(text, died) from None
        if answer is None:
            self._kill()
            raise EngineError(f"vLLM has not loaded {self.model_files.name} within {START_S:g} s")
        if "failed" in answer:
            self._kill()
            raise error_of(f"vLLM cannot load {self.model_files.name}: {answer['failed']}")

    def _kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
        self._pending.clear()

    def _running(self) -> ChildProcess:
        if self._asleep:
            raise EngineError("the engine sleeps; wake it first")
        if self._child is None:
            raise EngineBroken(f"the vLLM process of {self.model_files.name} is gone; open the engine again")
        return self._child

    def _send(self, message: Message) -> None:
        child = self._running()
        try:
            child.send(message)
        except ChildDied as died:
            self._kill()
            raise broken(died) from None

    def _take(self, wait_s: float) -> Message | None:
        """The child's next message that is not news, which is put aside for `_news`."""
        child = self._running()
        try:
            message = child.receive(wait_s)
        except ChildDied as died:
            self._kill()
            raise broken(died) from None
        if message is not None:
            self._heard_s = time.monotonic()
        if message is not None and "step" in message:
            self._pending += [
                News(key, tokens, logprobs, finish, message["at"], cached)
                for key, tokens, logprobs, finish, cached in message["step"]
            ]
        elif message is not None and "refused" in message:
            error = error_of(f"vLLM refuses the request: {message['why']}")
            self._pending.append(News(message["refused"], [], None, None, self._heard_s, error=error))
        else:
            return message
        return None

    def _call(self, what: str, **values: Any) -> Any:
        """Have the child do something, and what it says to it. Raises EngineError with the child's reason."""
        self._keys += 1
        number = self._keys
        self._send({"call": number, "what": what, **values})
        deadline = time.monotonic() + _CALL_S
        while (left := deadline - time.monotonic()) > 0:
            message = self._take(left)
            if message is None or number not in (message.get("result"), message.get("error")):
                continue
            if "error" in message:
                raise error_of(f"vLLM cannot {what}: {message['why']}")
            return message["value"]
        self._kill()
        raise EngineBroken(f"vLLM did not answer to {what} within {_CALL_S:g} s")

    # -- answering ----------------------------------------------------------------------------------------------------

    def _begin(self, request: Request, prompt: list[int]) -> int:
        self._keys += 1
        self._heard_s = time.monotonic()
        self._send(
            {
                "answer": self._keys,
                "prompt": prompt,
                "adapter": self._lora(request.adapter),
                "temperature": request.temperature,
                "seed": None if request.temperature == 0 else request.seed,
                "max_tokens": request.max_new_tokens,
                "stop": list(request.stop),
                "stop_ids": sorted(self._stop_ids),
                "logprobs": request.logprobs and request.structure is None,
                "structure": request.structure,
                "reuse_prompt": request.reuse_prompt,
            }
        )
        return self._keys

    def _news(self) -> list[News]:
        if not self._pending:
            self._take(_WAIT_S)
        if not self._pending and time.monotonic() - self._heard_s > SILENCE_S:
            self._kill()
            raise EngineBroken(f"vLLM has said nothing for {SILENCE_S:g} s, and requests wait for it")
        found, self._pending = list(self._pending), deque()
        return found

    def _abort(self, keys: Sequence[int]) -> None:
        if keys and self._child is not None and not self._asleep:
            self._send({"abort": list(keys)})

    def _score(self, tokens: list[int], start: int, adapter: str | None) -> list[float]:
        return list(self._call("score", prompt=tokens, start=start, adapter=self._lora(adapter)))

    def _lora(self, adapter: str | None) -> list[Any] | None:
        if adapter is not None:
            return self._loaded[adapter].message(adapter)
        return self._nothing.message("base") if self._nothing is not None and self._loaded else None

    # -- adapters -----------------------------------------------------------------------------------------------------

    def load_adapter(self, adapter: str, folder: Path) -> None:
        lora = adapter_room.load(folder)  # refuses what is damaged, hostile or cannot be computed correctly
        self._modules.check(adapter, lora, self.settings.max_lora_rank)
        if self.device == "cpu" and self._nothing is None:  # see __init__
            raise AdapterError(
                f"{self.model_files.name} takes no adapters on a CPU: nobody knows the sizes of its packed modules"
            )
        self._running()  # before anything is written
        loaded = self._save(lora)
        try:
            self._call("load", adapter=loaded.message(adapter))
        except EngineBroken:
            raise
        except EngineError as error:
            shutil.rmtree(loaded.folder, ignore_errors=True)
            if isinstance(error, OutOfMemoryError):
                raise
            raise AdapterError(f"adapter {adapter} does not fit {self.model_files.name}: {error}") from None
        self.unload_adapter(adapter)  # the old one, now that another can take its place
        self._loaded[adapter] = loaded

    def unload_adapter(self, adapter: str) -> None:
        loaded = self._loaded.pop(adapter, None)
        self._pinned.discard(adapter)
        self._canary.pop(adapter, None)  # `wake` compares what is still there
        if loaded is None:
            return
        if self._child is not None and not self._asleep:
            self._call("unload", number=loaded.number)
        shutil.rmtree(loaded.folder, ignore_errors=True)

    def adapters(self) -> list[str]:
        return sorted(self._loaded)

    def _has_room(self, adapter: str | None, out: Sequence[str | None]) -> bool:
        # vLLM's scheduler does not know that pinned adapters keep their slots from others, and breaks
        if not self._pinned:
            return True
        wanted = {adapter, *out} - self._pinned
        if self._nothing is None:
            wanted.discard(None)
        return len(wanted) <= self._slots - len(self._pinned)

    @property
    def _slots(self) -> int:
        return self.settings.max_loras + (self._nothing is not None)

    def pin(self, adapter: str) -> None:
        """Keep a loaded adapter in RAM and on the device whatever else is used; one slot stays for the others."""
        super().pin(adapter)
        if len(self._pinned | {adapter}) >= self._slots:
            raise EngineError(
                f"adapter {adapter} cannot be pinned: {self.settings.max_loras} slots, pinned: "
                f"{', '.join(sorted(self._pinned)) or 'none'}; allowed: at least one slot that is not pinned"
            )
        self._call("pin", adapter=self._lora(adapter))
        self._pinned.add(adapter)

    def rehearse(self) -> None:
        """Do once what an evolution will ask: load an adapter, answer with it, sleep, wake. Raises EngineError."""
        nothing = self._modules.without_effect()
        if nothing is not None:
            folder = self._scratch / _REHEARSAL
            adapter_room.save(nothing, folder)
            self.load_adapter(_REHEARSAL, folder)
            self.generate([Request(_CANARY, adapter=_REHEARSAL, max_new_tokens=_CANARY_TOKENS)])
        self.sleep()
        if self.wake():  # sleeping does not work here: from now on its process ends instead, which costs no try
            self.settings = dataclasses.replace(self.settings, sleep_mode=False)
        self.unload_adapter(_REHEARSAL)

    # -- sleeping -----------------------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """Leave the device to somebody else: weights go to RAM where vLLM and the RAM can take that, else the process
        ends.

        What fixed requests answer is kept first, for `wake` to compare.
        """
        if self._asleep:
            return
        self._canary = self._answer_canary()
        if self._device_sleeps and monitor.has_ram(self.sizes.weight_bytes):
            try:
                self._call("sleep")
            except EngineError:  # some of its weights may be gone already: `wake` starts it anew
                self._kill()
        else:
            self._kill()
        self._asleep = True

    def asleep_bytes(self) -> int:
        """What it keeps of a GPU while it sleeps."""
        return self.settings.outside_bytes if self._device_sleeps and self._child is not None else 0

    def wake(self) -> bool:
        """Take the device again. Whether the process had to be started anew: it answered differently, or did not sleep.

        Waking has been seen to damage adapters silently, so fixed requests must answer as they did before. Raises
        EngineBroken where they do not even in a new process.
        """
        if not self._asleep:
            return False
        self._asleep = False
        lost = self._device_sleeps and self._child is None  # it could not go to sleep whole
        if self._device_sleeps and not lost:
            with contextlib.suppress(EngineError):  # what does not wake is started anew below
                self._call("wake")
                if self._is_as_before():
                    return False
            self._restart()
            restarted = True
        else:
            self._restart()
            restarted = lost
        if not self._is_as_before():
            self._kill()
            raise EngineBroken(f"{self.model_files.name} answers differently after it slept, also in a new process")
        return restarted

    def _restart(self) -> None:
        self._kill()
        self._start()
        for adapter, loaded in self._loaded.items():
            self._call("load", adapter=loaded.message(adapter))
        for adapter in self._pinned:
            self._call("pin", adapter=self._lora(adapter))

    def _is_as_before(self) -> bool:
        # once more where not: on a GPU the sums of adapters depend on which thread was first
        return any(self._answer_canary() == self._canary for _ in range(2))

    def _answer_canary(self) -> dict[str | None, list[int]]:
        """The tokens of fixed greedy requests: the base model's and those of every adapter.

        Each alone, and nothing read before: sums in 16 bits depend on both, and a tie that falls the other way would
        be taken for damage.
        """
        names: list[str | None] = [None, *self.adapters()]
        requests = [Request(_CANARY, adapter=name, max_new_tokens=_CANARY_TOKENS, reuse_prompt=False) for name in names]
        return {request.adapter: self.generate([request])[0].token_ids for request in requests}

    # -- the model ----------------------------------------------------------------------------------------------------

    def _end_token_ids(self) -> set[int]:
        return set(as_list(getattr(getattr(self, "_generation", None), "eos_token_id", None)))

    def _vocabulary_size(self) -> int:
        return int(self._config.vocab_size)

    def context_length(self) -> int:
        return self.settings.max_model_len - 1  # vLLM scores a whole answer only where one token more would fit

    def parameters(self) -> int:
        """Number of weights of the base model."""
        return self.sizes.shape.parameters

    def vram_peak_mib(self) -> float:
        if self.device == "cpu" or self._child is None or self._asleep:
            return 0.0
        return float(self._call("measure"))

    def ram_peak_mib(self) -> float:
        return 0.0 if self._child is None else ram_peak_mib(self._child.pid)

    def planned_vram_mib(self, rows: int, tokens: int) -> float:
        if self.device == "cpu":
            return 0.0
        return planned_bytes(self.settings, self.sizes) / 2**20  # taken at the start, whatever is asked

    def close(self) -> None:
        self._kill()
        self._loaded.clear()
        shutil.rmtree(self._scratch, ignore_errors=True)
