"""Evolution beside its honest rival: one plain SFT with as many optimiser steps as all candidates together.

A whole run of the settings for each seed, then the SFT with the settings' own learning rate; both answer the sealed
items, and so does the base model. The SFT pays for training alone; evolution also pays for scoring, which is printed.
Takes any suite, for example one of six labels out of CLINC150, none of them built in:
  agentlab suite make ../data/clinc150 --format clinc150 --labels translate,timer,recipe,taxes,gas,flip_coin --out six
  python benchmarks/equal_cost.py --suite six

Expected time at the defaults: about 13 minutes a seed on two cores without a GPU. Ends in one JSON line.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parent.parent / "experiments" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="toolcalls", help="built-in name or folder (default: %(default)s)")
    parser.add_argument("--experiment", type=Path, default=DEMO, help="its settings (default: the demo's)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one"
    )
    parser.add_argument("--seeds", default="7", help="numbers with commas between (default: %(default)s)")
    options = parser.parse_args()

    rows = []
    for seed in options.seeds.split(","):
        rows.append(measure(options, int(seed)))
        print(describe(rows[-1]), flush=True)
    result = {
        "benchmark": "equal_cost",
        "suite": options.suite,
        "seeds": rows,
        "beats_base": all(row["gain"][1] > 0 for row in rows),
        # not below: the interval of champion minus SFT reaches zero
        "not_below_sft": all(row["over_sft"][2] >= 0 for row in rows),
        "ratio": sum(row["champion"] for row in rows) / max(sum(row["sft"] for row in rows), 1e-9),
    }
    print(f"champion at {result['ratio']:.3f} of the SFT's accuracy, mean over {len(rows)} seeds")
    print(json.dumps(result))


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run and its rival in a project folder of their own; accuracies on the sealed items, gains with bounds."""
    from agentlab import Lab
    from agentlab.report.describe import describe as in_words

    with tempfile.TemporaryDirectory() as scratch:
        experiment = Path(scratch) / "experiments" / "equal-cost.yaml"
        experiment.parent.mkdir()
        experiment.write_text(options.experiment.read_text(encoding="utf-8"), encoding="utf-8")
        folder = Path(options.suite)
        suite = str(folder.resolve()) if folder.is_dir() else options.suite
        lab = Lab.open(experiment, [f"suite={suite}", f"seed={seed}", *options.overrides])
        started = time.perf_counter()
        for event in lab.evolve():
            if event.kind in ("evaluated", "gate_decided"):
                print(f"  {in_words(event)}", flush=True)
        evolved_s = time.perf_counter() - started
        sealed = lab.run.sealed()
        if sealed is None:
            raise SystemExit("no candidate passed the gate: nothing to compare")
        rival = lab.baseline()
        return {
            "seed": seed,
            "items": sealed.items,
            "base": sealed.base.accuracy,
            "champion": sealed.champion_score.accuracy,
            "gain": [sealed.gain, sealed.gain_ci_low, sealed.gain_ci_high],
            "sft": rival.score.accuracy,
            "over_sft": [rival.gain, rival.gain_ci_low, rival.gain_ci_high],
            "steps": rival.steps,
            "train_tokens": rival.population_train_tokens,
            "sft_train_tokens": rival.train_tokens,
            "evolved_s": evolved_s,
        }


def describe(row: dict[str, Any]) -> str:
    """A run for people."""
    gain, over = ([f"{100 * value:+.1f}" for value in row[key]] for key in ("gain", "over_sft"))
    return (
        f"seed {row['seed']}: base {row['base']:.1%}, champion {row['champion']:.1%} ({gain[0]} points, {gain[1]} to "
        f"{gain[2]}), one SFT of {row['steps']} steps {row['sft']:.1%}: champion minus SFT {over[0]} ({over[1]} to "
        f"{over[2]}) on {row['items']} sealed items"
    )


if __name__ == "__main__":
    main()
