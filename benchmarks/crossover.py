"""How long the exact crossover of two adapters takes on one large linear layer, and how far off it is.

The rival is the obvious way, which PEFT's `svd` takes too: the dense weighted delta and its SVD. On the default layer
that takes seconds and is left out unless asked for; a smaller layer shows both.
Ends in one JSON line.
"""

import argparse
import json
import statistics
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=1536, help="rows of the layer's weight (default: %(default)s)")
    parser.add_argument("--in", type=int, default=8960, dest="in_", help="columns (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="rank of parents and child (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after one warm-up (default: %(default)s)")
    parser.add_argument("--dense", action="store_true", help="time the dense SVD on the full layer too (seconds)")
    options = parser.parse_args()

    layers = [(options.out // 4, options.in_ // 4, True), (options.out, options.in_, options.dense)]
    print(f"{'layer':>14} {'rank':>5} {'exact, s':>9} {'dense SVD, s':>13} {'relative difference':>20}")
    results = []
    for n_out, n_in, dense in layers:
        result = measure(n_out, n_in, options.rank, options.repeats, dense=dense)
        results.append(result)
        dense_s = "not run" if result["dense_s"] is None else f"{result['dense_s']:.3f}"
        off = "" if result["relative_difference"] is None else f"{result['relative_difference']:.1e}"
        print(
            f"{f'{n_out}x{n_in}':>14} {options.rank:>5} {result['exact_s']:>9.4f} {dense_s:>13} {off:>20}", flush=True
        )
    print(json.dumps({"benchmark": "crossover", "target_s": 1.0, "met": results[-1]["exact_s"] < 1, "layers": results}))


def measure(n_out: int, n_in: int, rank: int, repeats: int, *, dense: bool) -> dict[str, Any]:
    """Seconds (median) of the exact crossover of two random parents, and of the dense way where asked for."""
    import torch

    from agentlab.adapters import Lora, crossover, delta

    generator = torch.Generator().manual_seed(0)
    parents = []
    for _ in range(2):
        a = torch.randn(rank, n_in, generator=generator) / n_in**0.5
        b = torch.randn(n_out, rank, generator=generator) * 0.01
        parents.append(Lora({"layer": (a, b)}, rank, 2.0 * rank, 0.0, ["layer"], ""))
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        child = crossover(parents, [0.6, 0.4], rank)
        seconds.append(time.perf_counter() - started)
    result: dict[str, Any] = {
        "out": n_out,
        "in": n_in,
        "rank": rank,
        "exact_s": statistics.median(seconds[1:]),
        "dense_s": None,
        "relative_difference": None,
        "threads": torch.get_num_threads(),
    }
    if dense:
        started = time.perf_counter()
        u, s, vh = torch.linalg.svd(0.6 * delta(parents[0], "layer") + 0.4 * delta(parents[1], "layer"), False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        result["dense_s"] = time.perf_counter() - started
        result["relative_difference"] = float((delta(child, "layer") - best).norm() / best.norm())
    return result


if __name__ == "__main__":
    main()
