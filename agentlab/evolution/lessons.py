"""Which training items a candidate learns from: drawn by its data mix, a continuation's by what its parent lacks."""

import dataclasses

import numpy as np

from agentlab import adapters
from agentlab.errors import EvolutionStopped
from agentlab.events import Focused, Warned
from agentlab.evolution.bench import Bench
from agentlab.evolution.run import Run
from agentlab.hardware.oom import is_out_of_memory, let_go
from agentlab.learning import encode, sample
from agentlab.records import Genome
from agentlab.tasks import Item

_LEAST_STEPS = 8  # of a part
_LOOKED_AT = 2  # times as many items as are learned from


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a candidate's training: its genome with the steps and the seed of this part, and whether it looks."""

    genome: Genome
    looks: bool


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
    from agentlab.learning.doubt import doubts  # which loads torch

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
    except EvolutionStopped:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        bench.emit(Warned(message=f"{genome.candidate}: no memory to look for what it lacks; it learns from all items"))
        return sample(items, count, genome.data_mix, genome.seed)
    bench.emit(Focused(candidate=genome.candidate, items=len(fitting), doubted=int((doubt > 0.5).sum())))
    wanted = 1 - focus + focus * doubt
    return sample([item for item, _ in fitting], count, genome.data_mix, genome.seed, wanted)
