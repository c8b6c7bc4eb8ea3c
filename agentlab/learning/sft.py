"""Supervised fine-tuning of one candidate with TRL on the resident base model."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from agentlab.adapters import Lora
from agentlab.errors import EvolutionStopped
from agentlab.events import Event, RemedyApplied, TrainingStep, Warned
from agentlab.hardware.oom import is_out_of_memory, let_go
from agentlab.hardware.sizing import halved
from agentlab.inference.transformers_engine import TransformersEngine
from agentlab.learning.averaging import WeightAverage, trained_weights
from agentlab.learning.dataset import Example
from agentlab.learning.state import CarryOn, TrainingState
from agentlab.learning.trainer import CompactSFTTrainer
from agentlab.learning.trouble import Attempt, TrainingFailed, TrainingTrouble, check_loss, remedy
from agentlab.records import Genome, Training

_WARM_START = 5  # one step in so many warms up where training begins with weights that know something
_SLOT = "candidate"  # the adapter being trained; no id of a trained one looks like it


class _Schedule(NamedTuple):
    """What no remedy changes; `train` says what each is."""

    warmup_steps: int
    average: float
    loraplus_ratio: float


def train(
    engine: TransformersEngine,
    genome: Genome,
    start: Lora | None,
    examples: Sequence[Example],
    *,
    warmup_steps: int = 1,
    average: float = 0.0,
    loraplus_ratio: float = 1.0,
    max_length: int = 1024,
    max_remedies: int = 3,
    micro_batch: int | None = None,
    resume: TrainingState | None = None,
    keep: Callable[[TrainingState], None] | None = None,
    emit: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Lora, Training]:
    """The trained LoRA weights and what training took.

    start: weights to begin with (the merged parents); None: a fresh LoRA, which leaves the model unchanged.
    resume: where the training of `start` ended; this one goes on there, without another warm-up, and at no higher a
    learning rate than that one ended with.
    keep: gets where this one ended.
    examples: genome.steps × genome.batch_size of them are used, in order of the trainer's seeded shuffle.
    average: the share of the steps, the last ones, whose weights are averaged, at a steady learning rate, those of the
    training that this one continues included; 0: the last step's weights, at a rate that falls to zero in a line, which
    is TRL's default.
    loraplus_ratio: how many times A's learning rate B's is (LoRA+); 1: one rate for both, as in TRL.
    max_remedies: against NaN and divergence; those against a lack of memory end by themselves.
    micro_batch: most items that fit into memory at once, where that is known; a step's others are accumulated.
    Raises TrainingFailed when no remedy is left, EvolutionStopped when `should_stop()` turns true.
    """
    fitting = [example for example in examples if len(example.input_ids) <= max_length]
    if len(fitting) < len(examples):
        left_out = len(examples) - len(fitting)
        emit(Warned(message=f"{genome.candidate}: {left_out} items longer than {max_length} tokens are left out"))
    if not fitting:
        raise TrainingFailed(f"every training item is longer than training.max_length = {max_length} tokens")
    if start is not None:  # Adam's first steps are of full size whatever the gradient: they would shake what is known
        warmup_steps = max(warmup_steps, genome.steps // _WARM_START)
    schedule = _Schedule(warmup_steps, average, loraplus_ratio)
    # on a GPU memory is scarce from the beginning; on a CPU checkpointing would only cost time
    rate = min(genome.learning_rate, resume.learning_rate) if resume else genome.learning_rate
    rows = genome.batch_size
    while micro_batch is not None and rows > max(1, micro_batch):
        rows = halved(rows)
    attempt = Attempt(rate, rows, genome.batch_size // rows, checkpointing=engine.device == "cuda")
    remedies: list[dict[str, Any]] = []
    unstable = 0  # attempts that ended in NaN or divergence; lack of memory has a ladder that ends by itself
    started = time.monotonic()
    while True:
        try:
            lora, losses, end = _attempt(
                engine,
                genome,
                start,
                resume,
                keep is not None,
                fitting,
                attempt,
                schedule,
                emit,
                should_stop,
            )
        except TrainingTrouble as trouble:
            following = remedy(attempt, trouble.problem, [len(example.input_ids) for example in fitting])
            unstable += trouble.problem != "out_of_memory"
            if following is None or unstable > max_remedies:
                raise TrainingFailed(f"{trouble} (after {len(remedies)} remedies)") from trouble
            attempt, action = following
            event = RemedyApplied(
                candidate=genome.candidate,
                problem=trouble.problem,
                action=action,
                learning_rate=attempt.learning_rate,
                batch_size=attempt.batch_size,
                accumulation=attempt.accumulation,
            )
            remedies.append({"problem": str(trouble), "action": action})
            emit(event)
            if attempt.max_tokens is not None:
                whole, limit = len(fitting), attempt.max_tokens
                fitting = [example for example in fitting if len(example.input_ids) <= limit]
                if left_out := whole - len(fitting):
                    text = (
                        f"{genome.candidate}: {left_out} items longer than {limit} tokens are left out: memory is short"
                    )
                    emit(Warned(message=text))
            continue
        if keep is not None and end is not None:
            keep(end)
        tokens = sum(len(example.input_ids) for example in fitting)
        seconds = time.monotonic() - started
        return lora, Training(train_seconds=seconds, train_tokens=tokens, losses=losses, remedies=remedies)


def _attempt(
    engine: TransformersEngine,
    genome: Genome,
    start: Lora | None,
    resume: TrainingState | None,
    keep: bool,
    examples: Sequence[Example],
    attempt: Attempt,
    schedule: _Schedule,
    emit: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> tuple[Lora, list[float], TrainingState | None]:
    disable_progress_bars()
    set_seed(genome.seed)
    engine.unload_adapter(_SLOT)
    engine.make_room()
    try:
        if start is None:
            engine.new_adapter(_SLOT, lora_config(genome))
        else:
            engine.add_adapter(_SLOT, start, trainable=True)
        engine.activate(_SLOT)
        if resume is not None and not resume.fits(engine.model):
            emit(Warned(message=f"{genome.candidate}: the kept training is of another adapter; it begins anew"))
            resume = None
        with _undisturbed(engine), tempfile.TemporaryDirectory() as scratch:
            steps = max(1, min(genome.steps, math.ceil(len(examples) / genome.batch_size)))
            tokens_per_step = sum(len(example.input_ids) for example in examples) / steps
            callback = _Watch(genome.candidate, steps, tokens_per_step, emit, should_stop)
            carry = CarryOn(resume, attempt.learning_rate, keep)
            averaging = []
            if schedule.average and resume is not None:  # until the training begins the model has `start`, a mean
                averaging = [WeightAverage(schedule.average, resume.steps, trained_weights(engine.model))]
            elif schedule.average:
                averaging = [WeightAverage(schedule.average)]
            warmup = 0 if resume is not None else schedule.warmup_steps  # Adam's moments are known, or not yet
            with _in_fp32(engine):
                trainer = CompactSFTTrainer(
                    model=engine.model,
                    args=sft_config(engine, scratch, genome.seed, attempt, steps, warmup, steady=schedule.average > 0),
                    train_dataset=Dataset.from_list([vars(example) for example in examples]),
                    processing_class=engine.tokenizer,
                    callbacks=[callback, carry, *averaging],  # the end is noted before the mean takes its place
                    loraplus_ratio=schedule.loraplus_ratio,
                )
            engine.activate(_SLOT)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        lora = engine.read_adapter(_SLOT)
        if not all(bool(torch.isfinite(w).all()) for pair in lora.modules.values() for w in pair):
            raise TrainingTrouble("nan", "the trained weights are not finite")
        return lora, callback.losses, carry.end
    except Exception as error:
        if is_out_of_memory(error):
            let_go(error)
            detail = str(error) or type(error).__name__  # a MemoryError usually says nothing
            raise TrainingTrouble("out_of_memory", detail.splitlines()[0][:200]) from error
        raise
    finally:
        engine.unload_adapter(_SLOT)
        if engine.device == "cuda":
            torch.cuda.empty_cache()


def lora_config(genome: Genome) -> LoraConfig:
    """PEFT's config for a fresh LoRA of this genome."""
    return LoraConfig(
        r=genome.rank,
        lora_alpha=genome.alpha,
        lora_dropout=genome.dropout,
        target_modules=sorted(genome.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def sft_config(
    engine: TransformersEngine,
    folder: str,
    seed: int,
    attempt: Attempt,
    steps: int,
    warmup_steps: int,
    steady: bool = False,
) -> SFTConfig:
    """TRL's settings for one candidate; the benchmark trains bare TRL with the same ones.

    steady: the learning rate stays where it is after the warm-up, for weights that are averaged.
    """
    on_gpu = engine.device == "cuda"
    config = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=attempt.batch_size,
        gradient_accumulation_steps=attempt.accumulation,
        learning_rate=attempt.learning_rate,
        lr_scheduler_type="constant_with_warmup" if steady else "linear",
        warmup_steps=min(warmup_steps, steps - 1),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=seed,
        data_seed=seed,
        completion_only_loss=True,
        max_length=None,  # examples were checked already; truncating would cut answers off
        gradient_checkpointing=attempt.checkpointing,
        use_cpu=not on_gpu,
        bf16=on_gpu and engine.base.dtype == torch.bfloat16,
        fp16=on_gpu and engine.base.dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,  # by default a NaN loss is hidden
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    if on_gpu:  # with more than one in sight the trainer would spread each batch over all, which TRL refuses
        config._n_gpu = 1
    return config


@contextlib.contextmanager
def _in_fp32(engine: TransformersEngine) -> Iterator[None]:
    """Keep the adapter in fp32: beside a quantized base TRL's trainer rounds it to bf16, weights that were inherited
    too, and then Adam's small steps are lost to rounding as well.
    """
    trained = [(parameter, parameter.data) for parameter in engine.model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter, value in trained:
            parameter.data = value


@contextlib.contextmanager
def _undisturbed(engine: TransformersEngine) -> Iterator[None]:
    """Give the base back as it was: TRL patches its forward for good, and each patch would wrap the one before."""
    base = engine.base
    embedding = base.get_input_embeddings()
    hooks = set(embedding._forward_hooks)
    patched = "forward" in vars(base)
    forward, use_cache = vars(base).get("forward"), base.config.use_cache
    try:
        yield
    finally:
        if patched:
            base.forward = forward
        else:
            vars(base).pop("forward", None)
        base.config.use_cache = use_cache
        if base.is_gradient_checkpointing:
            base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
        for hook in set(embedding._forward_hooks) - hooks:  # of TRL and of transformers, which removes its last alone
            del embedding._forward_hooks[hook]
        engine.model.eval()
        engine.model.zero_grad(set_to_none=True)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Turns the trainer's log into events, checks the loss, and polls the stop request at every step."""

    def __init__(
        self,
        candidate: str,
        steps: int,
        tokens_per_step: float,
        emit: Callable[[Event], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.candidate = candidate
        self.steps = steps
        self.emit = emit
        self.should_stop = should_stop
        self.losses: list[float] = []
        self.started = time.monotonic()
        self.tokens_per_step = tokens_per_step

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._poll()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._poll()

    def _poll(self) -> None:
        if self.should_stop():
            raise EvolutionStopped(f"stopped while training {self.candidate}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        check_loss(self.losses)
        now = time.monotonic()
        self.emit(
            TrainingStep(
                candidate=self.candidate,
                step=len(self.losses),
                steps=self.steps,
                loss=self.losses[-1],
                tokens=round(self.tokens_per_step * len(self.losses)),
                seconds=now - self.started,
            )
        )
        self.started = now
