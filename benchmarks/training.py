"""What a candidate's training costs beside bare TRL with the same settings.

  ours  agentlab.learning.sft.train on the resident base: inject the adapter, train with events, checks and the stop
        poll at every step, average the last weights, read them back, give the base back as it was
  bare  TRL's SFTTrainer(...).train() on the same resident base: same model, tokens, SFTConfig, LoRA config and seed
Both train a fresh LoRA on the same toolcalls examples, in turns after a one-step warm-up of each; printed are medians.
Cleaning up after bare TRL is not counted. On a CPU, ours computes the same loss with less work (it leaves prompt tokens
out of the projection onto the vocabulary); --same-loss adds a third way, bare TRL with that loss, which shows what
wrapping alone costs.

Expected time at the defaults: about 2 minutes on two cores without a GPU. Ends in one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from vram import device_name

BAR = 1.10
AVERAGE = 0.5  # of the weights, as evolution trains; the learning rate is the same steady one in all ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="examples per step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each way (default: %(default)s)")
    parser.add_argument("--same-loss", action="store_true", help="also time bare TRL with the project's loss")
    options = parser.parse_args()

    result = measure(options)
    print(f"{'way':<10} {'seconds':>8} {'s per step':>11} {'tokens/s':>9} {'final loss':>11}")
    for way, row in result["ways"].items():
        print(
            f"{way:<10} {row['seconds']:>8.2f} {row['seconds_per_step']:>11.3f} {row['tokens_per_s']:>9.1f} "
            f"{row['final_loss']:>11.5f}"
        )
    print(f"ours takes {result['ratio']:.2f} of bare TRL's time (bar: {BAR} or less)")
    if result["same_loss_ratio"] is not None:
        print(f"ours takes {result['same_loss_ratio']:.2f} of the time of bare TRL with the project's loss (no bar)")
    print(f"final losses differ by {result['final_loss_difference']:.1e}")
    print(json.dumps(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the repeats: seconds, tokens/s and final loss of each way, the ratios, whether the bar is met."""
    import torch
    from trl import SFTTrainer

    from agentlab import models, tasks
    from agentlab.inference.transformers_engine import TransformersEngine
    from agentlab.learning.dataset import encode, sample
    from agentlab.learning.sft import train
    from agentlab.learning.trainer import CompactSFTTrainer

    suite = tasks.load("toolcalls", Path.cwd())
    with TransformersEngine(models.resolve(options.model)) as engine:
        items = sample(suite.split("train"), options.steps * options.batch_size, {}, seed=0)
        examples = [encode(engine, suite, item) for item in items]
        longest = max(len(example.input_ids) for example in examples)

        def ours(steps: int) -> tuple[float, list[float]]:
            events: list[Any] = []
            started = time.perf_counter()
            some = examples[: steps * options.batch_size]
            _, training = train(
                engine, genome(options, steps), None, some, average=AVERAGE, max_length=longest, emit=events.append
            )
            assert not training.remedies, f"training needed remedies: {training.remedies}"
            return time.perf_counter() - started, training.losses

        ways = {"ours": ours, "bare": lambda steps: bare(engine, genome(options, steps), examples, SFTTrainer)}
        if options.same_loss:
            ways["same loss"] = lambda steps: bare(engine, genome(options, steps), examples, CompactSFTTrainer)
        runs: dict[str, list[tuple[float, list[float]]]] = {way: [] for way in ways}
        for run in ways.values():
            run(1)  # warm-up
        for number in range(options.repeats):
            for way, run in ways.items():
                runs[way].append(run(options.steps))
            print(f"round {number + 1} of {options.repeats} done", flush=True)

        tokens = sum(len(example.input_ids) for example in examples)
        seconds = {way: statistics.median(s for s, _ in found) for way, found in runs.items()}
        losses = {way: found[-1][1] for way, found in runs.items()}
        ratio = seconds["ours"] / seconds["bare"]
        return {
            "benchmark": "training",
            "model": options.model,
            "device": engine.device,
            "card": device_name(),
            "threads": torch.get_num_threads(),
            "steps": options.steps,
            "batch_size": options.batch_size,
            "repeats": options.repeats,
            "tokens": tokens,
            "ways": {
                way: {
                    "seconds": seconds[way],
                    "seconds_per_step": seconds[way] / options.steps,
                    "tokens_per_s": tokens / seconds[way],
                    "final_loss": losses[way][-1],
                }
                for way in ways
            },
            "ratio": ratio,
            "bar": BAR,
            "met": ratio <= BAR,
            "same_loss_ratio": seconds["ours"] / seconds["same loss"] if options.same_loss else None,
            "final_loss_difference": abs(losses["ours"][-1] - losses["bare"][-1]),
        }


def genome(options: argparse.Namespace, steps: int) -> Any:
    """A founder with the default LoRA, trained for `steps`."""
    from agentlab.config import LoraSettings, TrainingSettings
    from agentlab.records import Genome

    lora, training = LoraSettings(), TrainingSettings()
    return Genome(
        candidate="g000-c00",
        generation=0,
        operator="founder",
        parents=[],
        merge_weights=[],
        merge_method="",
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        learning_rate=training.learning_rate,
        steps=steps,
        batch_size=options.batch_size,
        data_mix={},
        weight_noise=0.0,
        mutated=[],
        seed=0,
    )


def bare(engine: Any, genome: Any, examples: list[Any], trainer_class: Any) -> tuple[float, list[float]]:
    """Seconds and losses of TRL's trainer alone, in the way its manual shows, on the engine's base model."""
    from datasets import Dataset
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from agentlab.learning.sft import lora_config, sft_config
    from agentlab.learning.trouble import Attempt

    base = engine.base
    before = {"forward": vars(base).get("forward"), "use_cache": base.config.use_cache}
    with tempfile.TemporaryDirectory() as folder:
        attempt = Attempt(genome.learning_rate, genome.batch_size, checkpointing=engine.device == "cuda")
        started = time.perf_counter()
        set_seed(genome.seed)
        trainer = trainer_class(
            model=base,
            args=sft_config(engine, folder, genome.seed, attempt, genome.steps, warmup_steps=1, steady=True),
            train_dataset=Dataset.from_list(
                [vars(example) for example in examples[: genome.steps * genome.batch_size]]
            ),
            processing_class=engine.tokenizer,
            peft_config=lora_config(genome),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        seconds = time.perf_counter() - started
    # The next run needs the base as it was: without adapter layers, and without the forward that TRL patched in.
    trainer.model.unload()
    if before["forward"] is None:
        vars(base).pop("forward", None)
    else:
        base.forward = before["forward"]
    base.config.use_cache = before["use_cache"]
    base.requires_grad_(False).eval()
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
