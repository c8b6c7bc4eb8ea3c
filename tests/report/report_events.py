"""The events of a synthetic run, for tests of progress and display."""

from agentlab import events
from agentlab.evolution.run import adapter_id
from agentlab.records import BASE


def evolution_events(
    generations: int = 3,
    size: int = 3,
    steps: int = 4,
    *,
    elites: int = 1,
    step_s: float = 3.0,
    item_s: float = 0.25,
    load_s: float = 12.0,
    failing: str = "g000-c01",
) -> list[events.Event]:
    """The events of one uninterrupted run, in the order in which a run emits them, with plausible times."""
    now = 1_790_000_000.0
    stream: list[events.Event] = []

    def add(kind: type[events.Event], after: float = 0.01, **fields: object) -> None:
        nonlocal now
        now += after
        stream.append(kind(time_s=now, **fields))  # type: ignore[arg-type]

    def answer(model: str, split: str, items: int, accuracy: float) -> None:
        for done in range(16, items, 16):
            add(events.EvaluationProgress, 16 * item_s, candidate=model, split=split, done=done, total=items)
        add(events.Evaluated, 16 * item_s, candidate=model, split=split, accuracy=accuracy, items=items,
            accuracy_ci_low=max(0.0, accuracy - 0.1), accuracy_ci_high=min(1.0, accuracy + 0.1),
            fitness=accuracy if split == "fitness" else None, seconds=items * item_s)  # fmt: skip

    add(events.EvolutionStarted, run="demo/1a2b3c4d", name="demo", generations=generations, population=size,
        continued=False)  # fmt: skip
    champion = BASE
    for generation in range(generations):
        add(events.GenerationStarted, 2, generation=generation, pid=4242, continued=False)
        add(events.ModelLoaded, load_s, model="smollm2-135m-instruct", engine="transformers", device="cpu",
            parameters=134_515_008, seconds=load_s)  # fmt: skip
        if generation == 0:
            add(events.Calibrated, 2, prefill_tokens_per_s=900.0, decode_tokens_per_s=13.0)
            answer(BASE, "fitness", 32, 0.02)
        names = [adapter_id(generation, i) for i in range(size - (elites if generation else 0))]
        for index, name in enumerate(names):
            parents = [] if generation == 0 else [adapter_id(generation - 1, 0), adapter_id(generation - 1, 2)]
            add(events.Bred, generation=generation, candidate=name, operator="crossover" if parents else "founder",
                parents=parents, merge_weights=[0.6, 0.4] if parents else [],
                genome={"steps": steps + index})  # fmt: skip
        for index, name in enumerate(names):
            add(events.TrainingStarted, 1, candidate=name, steps=steps + index, learning_rate=5e-4, rank=16)
            if name == failing:
                add(events.TrainingStep, step_s, candidate=name, step=1, steps=steps + index, loss=9.0, tokens=500,
                    seconds=step_s)  # fmt: skip
                add(events.RemedyApplied, candidate=name, problem="nan", action="halve_learning_rate",
                    learning_rate=2.5e-4, batch_size=8, accumulation=1)  # fmt: skip
                add(events.CandidateFailed, 1, candidate=name, reason="loss is NaN after 3 remedies\n[red]x[/red]")
                continue
            for step in range(1, steps + index + 1):
                add(events.TrainingStep, step_s, candidate=name, step=step, steps=steps + index, loss=2.5 / step,
                    tokens=500, seconds=step_s)  # fmt: skip
            add(events.Trained, 1, candidate=name, train_seconds=step_s * steps, train_tokens=4000, loss=0.4)
        alive = [name for name in names if name != failing]
        for name in alive:
            answer(name, "fitness", 32, 0.5 + generation / 10)
        if generation == 0:
            answer(BASE, "gate", 100, 0.02)
        answer(alive[0], "gate", 100, 0.6 + generation / 10)
        passed = generation != 1
        add(events.GateDecided, generation=generation, challenger=alive[0], incumbent=champion, wins=40, losses=2,
            items=100, p_value=0.001, alpha=0.0167, detectable_gain=0.09, passed=passed,
            verdict=f"{alive[0]} against {champion}: 40 wins, 2 losses")  # fmt: skip
        add(events.Selected, generation=generation, pool=alive[:2], culled=alive[2:])
        if passed:
            add(events.Promoted, generation=generation, adapter=alive[0], previous=champion, below_threshold=True)
            champion = alive[0]
        if generation == generations - 1:
            add(events.SealOpened, models=[BASE, "ab" * 32], opening=1)
            answer(BASE, "test", 200, 0.02)
            answer(champion, "test", 200, 0.8)
            add(events.SealedComparison, champion=champion, items=200, base_accuracy=0.02, champion_accuracy=0.8,
                gain=0.78, gain_ci_low=0.72, gain_ci_high=0.83, openings=1)  # fmt: skip
        add(events.GenerationFinished, 1, generation=generation, champion=champion, seconds=100.0)
    add(events.EvolutionFinished, 1, champion=champion, seconds=now - stream[0].time_s)
    return stream
