"""A population on two engines: the same adapters answer the same items on transformers and in one vLLM session.

For each adapter, and for the base model, `--items` items of the toolcalls suite are answered greedily, on transformers
one adapter after the other, on vLLM all adapters in one batch of mixed requests. Printed are the share of answers with
the very same tokens, tokens per second of each engine, and what opening each and loading the adapters took.

The adapters are random and change the model a little, as benchmarks/population.py makes them. Expected time at the
defaults: about 5 minutes on two cores without a GPU. Ends in one JSON line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from population import random_lora
from vram import device_name

SAME_BAR = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=8, help="adapters in the population (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="their rank (default: %(default)s)")
    parser.add_argument("--items", type=int, default=12, help="items per adapter (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens per answer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="requests at once (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=4, help="adapters on the device at once (default: %(default)s)")
    parser.add_argument("--vram-gib", type=float, default=5.0, help="vLLM's budget on a GPU (default: %(default)s)")
    result = measure(parser.parse_args())
    print(f"{'engine':<14} {'opened in s':>12} {'adapters in s':>14} {'answered in s':>14} {'tokens/s':>9}")
    for name, row in result["engines"].items():
        print(
            f"{name:<14} {row['open_s']:>12.1f} {row['load_s']:>14.2f} {row['answer_s']:>14.1f} "
            f"{row['tokens_per_s']:>9.1f}"
        )
    share, apart = result["same_share"], result["models_told_apart"]
    print(
        f"same tokens  {result['same_answers']} of {result['answers']} answers, {share:.3f} (bar: {SAME_BAR} or more)"
    )
    print(f"told apart   {apart} of {result['adapters'] + 1} models answer in their own way")
    print(json.dumps(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both engines' answers compared, and their times."""
    from agentlab import adapters, models, tasks
    from agentlab.inference import Engine, Request
    from agentlab.inference.transformers_engine import TransformersEngine
    from agentlab.inference.vllm_engine import VllmEngine

    suite = tasks.load("toolcalls", Path.cwd())
    chats = [suite.chat(item) for item in suite.split("fitness")[: options.items]]
    model = models.resolve(options.model)
    names = [f"g000-c{index:02d}" for index in range(options.adapters)]
    requests = [Request(chat, adapter=name, max_new_tokens=options.tokens) for name in (None, *names) for chat in chats]
    rows: dict[str, dict[str, float]] = {}
    answers: dict[str, list[list[int]]] = {}

    def run(name: str, engine: Engine, open_s: float, folders: dict[str, Path]) -> None:
        started = time.perf_counter()
        for adapter, folder in folders.items():
            engine.load_adapter(adapter, folder)
        load_s = time.perf_counter() - started
        engine.generate(requests[:1])  # warm-up
        started = time.perf_counter()
        completions = engine.generate(requests, options.batch)
        answer_s = time.perf_counter() - started
        tokens = sum(completion.completion_tokens for completion in completions)
        answers[name] = [completion.token_ids for completion in completions]
        rows[name] = {
            "open_s": open_s, "load_s": load_s, "answer_s": answer_s, "tokens_per_s": tokens / answer_s
        }  # fmt: skip
        print(f"{name} done", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in names}
        started = time.perf_counter()
        with TransformersEngine(model) as engine:
            open_s = time.perf_counter() - started
            for seed, folder in enumerate(folders.values()):
                adapters.save(random_lora(engine, options.rank, seed), folder)
            run("transformers", engine, open_s, folders)
            device = engine.device
        started = time.perf_counter()
        with VllmEngine(model, options.vram_gib, rank=options.rank, adapters=options.slots) as vllm:
            run("vllm", vllm, time.perf_counter() - started, folders)
    same = sum(one == two for one, two in zip(answers["transformers"], answers["vllm"], strict=True))
    size = len(chats)
    blocks = [tuple(map(tuple, answers["vllm"][at : at + size])) for at in range(0, len(requests), size)]
    return {
        "benchmark": "engines",
        "model": options.model,
        "device": device,
        "card": device_name(),
        "adapters": options.adapters,
        "rank": options.rank,
        "items": size,
        "tokens": options.tokens,
        "batch": options.batch,
        "slots": options.slots,
        "engines": rows,
        "answers": len(requests),
        "same_answers": same,
        "same_share": same / len(requests),
        "same_bar": SAME_BAR,
        "same_met": same / len(requests) >= SAME_BAR,
        "models_told_apart": len(set(blocks)),
    }


if __name__ == "__main__":
    main()
