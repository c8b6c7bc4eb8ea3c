"""What scoring a population costs beside the base model itself: its adapters, one after another, on one resident base.

Three ways to answer the same batch of prompts, every answer exactly --tokens long:
  base      the resident base model alone
  adapters  each adapter in turn on the resident base: load from disk, answer, unload
  reload    the obvious way: base and adapter from disk for every adapter (transformers, PEFT), answer
One repeat is base, half of the adapters, base, the other half, then --reloads adapters by reloading: a machine that
slows down slows all of them. Ratios are taken within a repeat; printed are medians over repeats.

Expected time at the defaults: about 4 minutes on two cores without a GPU. Ends in one JSON line.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from vram import device_name

SPEED_BAR = 0.9
COST_BAR = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name or folder (default: %(default)s)")
    parser.add_argument("--adapters", type=int, default=8, help="adapters in the population (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="their rank (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="requests, one batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--reloads", type=int, default=1, help="adapters reloaded per round (default: %(default)s)")
    options = parser.parse_args()

    result = measure(options)
    print(f"{'way':<10} {'tokens/s':>9} {'seconds per adapter':>20} {'of that, to switch':>19}")
    for way, row in result["ways"].items():
        switch = "" if row["switch_s"] is None else f"{row['switch_s']:.3f}"
        print(f"{way:<10} {row['tokens_per_s']:>9.1f} {row['seconds']:>20.2f} {switch:>19}")
    speed, cost, whole = result["speed_ratio"], result["switch_cost_ratio"], result["whole_time_ratio"]
    print(
        f"speed        adapters run at {speed:.2f} of the base's tokens/s, loading included (bar: {SPEED_BAR} or more)"
    )
    print(f"switch cost  one reload costs {cost:.1f} times one unload and load (bar: {COST_BAR:g} or more)")
    print(f"whole time   answering included, reloading takes {whole:.2f} times as long (no bar: decoding dominates,")
    print("             and plain generate does not share the prompts' common beginning)")
    print(json.dumps(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds: tokens/s and seconds of each way, the ratios, and whether the bars are met."""
    import torch

    from agentlab import models, tasks
    from agentlab.adapters import save
    from agentlab.inference import Request
    from agentlab.inference.transformers_engine import TransformersEngine

    suite = tasks.load("toolcalls", Path.cwd())
    items = suite.split("train")
    chats = [suite.chat(items[index % len(items)]) for index in range(options.batch)]
    expected = options.batch * options.tokens
    rounds = []
    with tempfile.TemporaryDirectory() as scratch, TransformersEngine(models.resolve(options.model)) as engine:
        # No answer may end early: every way then decodes the same number of tokens.
        engine.base.generation_config.min_new_tokens = options.tokens
        folders = {f"g000-c{index:02d}": Path(scratch) / f"g000-c{index:02d}" for index in range(options.adapters)}
        for seed, folder in enumerate(folders.values()):
            save(random_lora(engine, options.rank, seed), folder)

        def answer(adapter: str | None) -> float:
            started = time.perf_counter()
            requests = [Request(chat, adapter=adapter, max_new_tokens=options.tokens) for chat in chats]
            tokens = sum(completion.completion_tokens for completion in engine.generate(requests, options.batch))
            seconds = time.perf_counter() - started
            assert tokens == expected, f"{tokens} tokens decoded instead of {expected}"
            return seconds

        def on_resident_base(adapter: str) -> tuple[float, float]:
            started = time.perf_counter()
            engine.load_adapter(adapter, folders[adapter])
            loaded_s = time.perf_counter() - started
            answered_s = answer(adapter)
            started = time.perf_counter()
            engine.unload_adapter(adapter)
            return loaded_s + time.perf_counter() - started, answered_s

        prompts = [engine.render(chat) for chat in chats]
        names = list(folders)
        half = (len(names) + 1) // 2
        answer(None)  # warm-up
        on_resident_base(names[0])
        for number in range(options.repeats):
            base, resident, reloaded = [], [], []
            for some in (names[:half], names[half:]):
                base.append(answer(None))
                resident += [on_resident_base(name) for name in some]
            for index in range(options.reloads):
                folder = folders[names[(number * options.reloads + index) % len(names)]]
                reloaded.append(by_reloading(engine, folder, prompts, options.tokens))
            rounds.append((statistics.fmean(base), resident, reloaded))
            print(f"round {number + 1} of {options.repeats} done", flush=True)

        def row(seconds: list[float], switch: list[float] | None) -> dict[str, float | None]:
            middle = statistics.median(seconds)
            return {
                "tokens_per_s": expected / middle,
                "seconds": middle,
                "switch_s": None if switch is None else statistics.median(switch),
            }

        base_s = [base for base, _, _ in rounds]
        resident_s = [mean_total(resident) for _, resident, _ in rounds]
        reloaded_s = [mean_total(reloaded) for _, _, reloaded in rounds]
        switch_s = [switch for _, resident, _ in rounds for switch, _ in resident]
        reload_s = [reload for _, _, reloaded in rounds for reload, _ in reloaded]
        speed = statistics.median(base / own for base, own in zip(base_s, resident_s, strict=True))
        cost = statistics.median(reload_s) / statistics.median(switch_s)
        return {
            "benchmark": "population",
            "model": options.model,
            "device": engine.device,
            "card": device_name(),
            "threads": torch.get_num_threads(),
            "adapters": options.adapters,
            "rank": options.rank,
            "batch": options.batch,
            "tokens": options.tokens,
            "repeats": options.repeats,
            "ways": {
                "base": row(base_s, None),
                "adapters": row(resident_s, switch_s),
                "reload": row(reloaded_s, reload_s),
            },
            "speed_ratio": speed,
            "speed_bar": SPEED_BAR,
            "speed_met": speed >= SPEED_BAR,
            "switch_cost_ratio": cost,
            "switch_cost_bar": COST_BAR,
            "switch_cost_met": cost >= COST_BAR,
            "whole_time_ratio": statistics.median(
                reloaded / own for reloaded, own in zip(reloaded_s, resident_s, strict=True)
            ),
        }


def mean_total(parts: list[tuple[float, float]]) -> float:
    """Mean over adapters of switching and answering together, seconds."""
    return statistics.fmean(switch + answer for switch, answer in parts)


def random_lora(engine: Any, rank: int, seed: int) -> Any:
    """An adapter on q, k, v and o that changes the model a little."""
    import torch

    from agentlab.adapters import Lora

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in engine.base.named_modules():
        if name.endswith(tuple(targets)):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) * 0.01
            modules[name] = (a, b)
    return Lora(modules, rank, 2.0 * rank, 0.0, targets, "")


def by_reloading(engine: Any, folder: Path, prompts: list[str], tokens: int) -> tuple[float, float]:
    """Seconds to (load base and adapter from disk and free them, answer) without the engine.

    The files are in the system's cache and the tokenizer is not loaded again: both favour reloading.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(engine.model_files.folder, dtype=engine.base.dtype).to(engine.device)
    model: Any = PeftModel.from_pretrained(base, folder).eval()
    loaded_s = time.perf_counter() - started

    started = time.perf_counter()
    batch = engine.tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt").to(engine.device)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=engine.tokenizer.pad_token_id,
    ).tolist()
    answered_s = time.perf_counter() - started
    new_tokens = len(output[0]) - batch["input_ids"].shape[1]
    assert new_tokens == tokens, f"{new_tokens} tokens decoded instead of {tokens}"

    started = time.perf_counter()
    del base, model
    gc.collect()
    return loaded_s + time.perf_counter() - started, answered_s


if __name__ == "__main__":
    main()
