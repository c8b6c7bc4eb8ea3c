"""How a candidate is taught: its training in parts, and the items that each part learns from."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from agentlab import adapters
from agentlab.events import Event, Focused, TrainingStarted, TrainingStep, Warned
from agentlab.evolution import continuing
from agentlab.evolution.bench import Bench
from agentlab.evolution.run import Run
from agentlab.hardware.meter import PeakMeter
from agentlab.hardware.oom import is_out_of_memory, let_go
from agentlab.learning import encode, sample
from agentlab.learning.doubt import doubts
from agentlab.learning.sft import train
from agentlab.learning.state import TrainingState
from agentlab.records import Genome, Training
from agentlab.tasks import Item

_LEAST_STEPS = 8  # of a part
_LOOKED_AT = 2  # times as many items as are learned from


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a candidate's training: its genome with the steps and the seed of this part, and whether it looks."""

    genome: Genome
    looks: bool


def teach(bench: Bench, genome: Genome, start: adapters.Lora | None) -> tuple[adapters.Lora, Training]:
    """Train a candidate in its parts, each of which goes on where the last one ended: its weights, and what it took.

    start: the weights that it begins with; None: a fresh LoRA. Raises what `sft.train` raises.
    """
    settings = bench.run.settings.training
    bench.emit(
        TrainingStarted(
            candidate=genome.candidate, steps=genome.steps, learning_rate=genome.learning_rate, rank=genome.rank
        )
    )
    learner, lora = bench.learner, start
    meter = PeakMeter()
    resume = continuing.beginning(bench.run, genome, bench.emit)
    whole = Training(train_seconds=0.0, train_tokens=0, losses=[])
    divided = parts(bench.run, genome)
    for number, part in enumerate(divided, start=1):
        ends: list[TrainingState] = []
        began = time.monotonic()
        items = chosen(bench, part, lora)
        looked_s = time.monotonic() - began  # a part of what training takes
        lora, training = train(
            learner,
            part.genome,
            lora,
            [encode(learner, bench.suite, item) for item in items],
            warmup_steps=settings.warmup_steps,
            average=settings.average,
            loraplus_ratio=settings.loraplus_ratio,
            max_length=settings.max_length,
            max_remedies=settings.max_remedies,
            micro_batch=bench.micro_batch,
            resume=resume,
            keep=continuing.keeper(bench.run, genome, bench.emit) if number == len(divided) else ends.append,
            emit=_going_on(bench.emit, genome, whole),
            should_stop=bench.should_stop,
        )
        resume = ends[0] if ends else None
        whole = Training(
            train_seconds=whole.train_seconds + looked_s + training.train_seconds,
            train_tokens=whole.train_tokens + training.train_tokens,
            losses=[*whole.losses, *training.losses],
            remedies=[*whole.remedies, *training.remedies],
        )
    assert lora is not None, "a candidate is trained in one part at least"
    peaks = {"vram_peak_mib": meter.vram_peak_mib(), "ram_peak_mib": meter.ram_peak_mib()}
    return lora, whole.model_copy(update=peaks)


def _going_on(emit: Callable[[Event], None], genome: Genome, before: Training) -> Callable[[Event], None]:
    """`emit` for a part of a training: its steps are counted on from those before."""

    def counted(event: Event) -> None:
        if isinstance(event, TrainingStep):
            event = dataclasses.replace(
                event, step=len(before.losses) + event.step, steps=genome.steps,
                tokens=before.train_tokens + event.tokens,
            )  # fmt: skip
        emit(event)

    return counted


def parts(run: Run, genome: Genome) -> list[Part]:
    """How a candidate's training is divided. A continuation looks at what it lacks at its beginning and halfway.

    Not at the beginning after a founder, which has learned too little to lack anything in particular, and halfway only
    where each half has steps enough to be worth a look.
    """
    if genome.operator != "continuation" or not run.settings.training.focus:
        return [Part(genome, looks=False)]
    parent = run.candidate(genome.parents[0])
    first = parent is None or parent.genome.operator != "founder"
    if genome.steps < 2 * _LEAST_STEPS:
        return [Part(genome, looks=first)]
    half = genome.steps // 2
    seed = int(np.random.SeedSequence([genome.seed, 1]).generate_state(1)[0] % 2**31)
    later = genome.model_copy(update={"steps": genome.steps - half, "seed": seed})
    return [Part(genome.model_copy(update={"steps": half}), looks=first), Part(later, looks=True)]


def chosen(bench: Bench, part: Part, start: adapters.Lora | None) -> list[Item]:
    """The items of a part of a training, in order, steps × batch size.

    start: the weights that it begins with. Where it looks, it goes through the training split with new eyes: what
    `start` would get wrong comes first and more often (hard example mining, Shrivastava et al. 2016; online batch
    selection, Loshchilov and Hutter 2015). Where memory does not suffice to look, the items are drawn evenly.
    """
    genome, items = part.genome, bench.suite.split("train")
    count = genome.steps * genome.batch_size
    focus = bench.run.settings.training.focus
    if start is None or not part.looks:
        return sample(items, count, genome.data_mix, genome.seed)
    learner = bench.learner
    seen = sample(items, min(len(items), _LOOKED_AT * count), {}, genome.seed)
    fitting = [
        (item, example) for item in seen
        if len((example := encode(learner, bench.suite, item)).input_ids) <= bench.run.settings.training.max_length
    ]  # fmt: skip
    if not fitting:
        return sample(items, count, genome.data_mix, genome.seed)
    try:
        doubt = doubts(learner, start, [example for _, example in fitting], bench.should_stop)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        bench.emit(Warned(message=f"{genome.candidate}: no memory to look for what it lacks; it learns from all items"))
        return sample(items, count, genome.data_mix, genome.seed)
    bench.emit(Focused(candidate=genome.candidate, items=len(fitting), doubted=int((doubt > 0.5).sum())))
    wanted = 1 - focus + focus * doubt
    return sample([item for item, _ in fitting], count, genome.data_mix, genome.seed, wanted)
