"""How long a person waits: an agent's answers one at a time, with 8 adapters resident, against the 2-second target.

The agent has its built-in tools and answers with one of the adapters; the others are loaded beside it, as while a
population is served. Each task is asked once after a warm-up. Printed are p50 and p95 of the whole answer and of its
first piece, the share within the target, and tokens per second. On a GPU all stays within --vram-gib: as in a run the
allocator gets what the driver's context leaves, and --rung auto is the most precise rung whose weights fit; on a CPU
the figures say what a CPU does, and the line says so. On transformers all is measured twice more: with every prompt
read from its beginning, for what keeping keys and values between requests gains, and with one token in each pass, for
what reading drafts along gains.

The adapters are random and change the model a little. Expected time at the defaults: about 7 minutes on two cores
without a GPU. Ends in one JSON line.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from population import random_lora
from vram import device_name

TASKS = (
    "What is 17 % of 2340?",
    "What is the capital of France?",
    "Name three colours.",
    "What is 12 * 34?",
    "Say hello in French.",
    "What time is it?",
    "Is water wet? Answer in one sentence.",
    "How many days has a week?",
)


def main() -> None:
    options = parser().parse_args()
    result = measure(options)
    if options.engine == "transformers":
        for way, other in (
            ("anew", measure(options, reuse_prompts=False)), ("undrafted", measure(options, drafts=False)),
        ):  # fmt: skip
            compared = ("answer_p50_s", "answer_p95_s", "first_p50_s", "first_p95_s")
            result |= {f"{way}_{key}": other[key] for key in compared}
            result[f"{way}_gain"] = other["answer_p50_s"] / result["answer_p50_s"]
    for name, key in (("whole answer", "answer"), ("first piece", "first")):
        print(f"{name:<14} p50 {result[f'{key}_p50_s']:.2f} s, p95 {result[f'{key}_p95_s']:.2f} s")
    for way, what in (("anew", "every prompt read anew"), ("undrafted", "one token in each pass")):
        if f"{way}_gain" in result:
            seconds, gain = result[f"{way}_answer_p50_s"], result[f"{way}_gain"]
            print(f"{what}: p50 {seconds:.2f} s, {gain:.2f} times as long")
    where = "a CPU: no statement about a GPU" if result["device"] == "cpu" else result["device"]
    print(
        f"within {result['target_s']:g} s  {result['within_target']:.0%} of {result['answers']} answers of "
        f"{result['tokens_per_answer']:.0f} tokens on {where}"
    )
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from agentlab.hardware.rungs import RUNGS

    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="smollm2-135m-instruct", help="name or folder (default: %(default)s)")
    found.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    found.add_argument("--adapters", type=int, default=8, help="resident ones (default: %(default)s)")
    found.add_argument("--rank", type=int, default=16, help="their rank (default: %(default)s)")
    found.add_argument("--tokens", type=int, default=32, help="most tokens of an output (default: %(default)s)")
    found.add_argument("--repeats", type=int, default=3, help="times each task is asked (default: %(default)s)")
    found.add_argument("--rung", choices=["auto", *RUNGS], default="auto", help="precision, on transformers alone")
    found.add_argument("--vram-gib", type=float, default=5.0, help="limit on a GPU (default: %(default)s)")
    found.add_argument("--context-gib", type=float, default=0.35, help="the driver's part of it (default: %(default)s)")
    found.add_argument("--target-s", type=float, default=2.0, help="of a whole answer (default: %(default)s)")
    return found


def open_transformers(options: argparse.Namespace, files: Any) -> Any:
    """The transformers engine as a run opens it, within the same limits."""
    from agentlab import config
    from agentlab.inference import open_engine

    budget = {"vram_gib": options.vram_gib, "context_gib": options.context_gib}
    settings = config.from_mapping({"name": "latency", "model": {"rung": options.rung}, "budget": budget}, "latency")
    return open_engine(settings, files, "transformers")


def measure(options: argparse.Namespace, reuse_prompts: bool = True, drafts: bool = True) -> dict[str, Any]:
    """Times of all answers."""
    from agentlab import models
    from agentlab.adapters import save
    from agentlab.agent import Agent, Options
    from agentlab.agent.steps import Answered, Delta
    from agentlab.inference import Engine
    from agentlab.inference.chain import Chain, Link

    files = models.resolve(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        folders = {f"g000-c{number:02d}": Path(scratch) / f"g000-c{number:02d}" for number in range(options.adapters)}
        with open_transformers(options, files) as engine:
            device, rung = engine.device, engine.rung
            for number, folder in enumerate(folders.values()):
                save(random_lora(engine, options.rank, number), folder)

        def opened() -> Engine:
            found: Engine
            if options.engine == "vllm":
                from agentlab.inference.vllm_engine import VllmEngine

                found = VllmEngine(
                    files, options.vram_gib, rank=options.rank, adapters=options.adapters,
                    context_gib=options.context_gib,
                )  # fmt: skip
            else:
                found = open_transformers(options, files)
                found.drafts = drafts  # type: ignore[attr-defined]
                stream = found.stream
                found.stream = lambda request, *stop: stream(  # type: ignore[method-assign]
                    dataclasses.replace(request, reuse_prompt=reuse_prompts), *stop
                )
            for name, folder in folders.items():
                found.load_adapter(name, folder)
            return found

        first, *_ = folders
        link = Link("primary", files.name, opened, adapter=first, adapter_folder=folders[first])
        whole, began, tokens, ways = [], [], 0, []
        with Agent(Chain([link]), options=Options(max_new_tokens=options.tokens)) as agent:
            agent.load()
            agent.ask(TASKS[0])  # warm-up
            for task in TASKS * options.repeats:
                started, first_s = time.perf_counter(), None
                for step in agent.run(task):
                    if isinstance(step, Delta) and first_s is None:
                        first_s = time.perf_counter() - started
                    if isinstance(step, Answered):
                        tokens += step.result.completion_tokens
                        ways.append(step.result.state)
                whole.append(time.perf_counter() - started)
                began.append(whole[-1] if first_s is None else first_s)
    return {
        "benchmark": "latency",
        "model": options.model,
        "engine": options.engine,
        "rung": rung if options.engine == "transformers" else None,
        "device": device,
        "card": device_name(),
        "adapters": options.adapters,
        "answers": len(whole),
        "states": {state: ways.count(state) for state in sorted(set(ways))},
        "answer_p50_s": percentile(whole, 50),
        "answer_p95_s": percentile(whole, 95),
        "first_p50_s": percentile(began, 50),
        "first_p95_s": percentile(began, 95),
        "tokens_per_answer": tokens / len(whole),
        "tokens_per_s": tokens / sum(whole),
        "target_s": options.target_s,
        "within_target": sum(one <= options.target_s for one in whole) / len(whole),
        "target_met": percentile(whole, 95) <= options.target_s,
    }


def percentile(values: list[float], percent: int) -> float:
    """The percentile between the two values around it."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


if __name__ == "__main__":
    main()
