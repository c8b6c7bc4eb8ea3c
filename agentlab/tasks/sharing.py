"""Which row goes into which split: every prompt once, every group in proportion, the source's own splits kept."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from agentlab.errors import SuiteError
from agentlab.tasks.checkers import same_answer
from agentlab.tasks.items import SPLITS, leak_key, natural_group
from agentlab.tasks.sources import Pools, Row

MOST = {"fitness": 64, "gate": 200, "test": 400}
"""The default sizes, where the data are many; of few data a tenth, a quarter (of 300 to 400 rows 100) and a quarter."""


def _prompt_key(row: Row) -> str:
    messages = row.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": row["prompt"]}]
    return leak_key([message for message in messages if isinstance(message, dict) and "content" in message])


def drop_duplicates(pools: Pools, metric: str) -> tuple[Pools, int, int]:
    """The pools with every prompt once, its first row kept, in test before validation before train.

    Also how many rows went, and how many prompts had contradictory answers (to the same tools).
    """
    seen: dict[str, Row] = {}
    contradictory: set[str] = set()
    kept: Pools = {}
    for name in ("test", "validation", "train"):
        kept[name] = []
        for row in pools.get(name, []):
            key = _prompt_key(row)
            first = seen.setdefault(key, row)
            if first is row:
                kept[name].append(row)
            elif first.get("tools") == row.get("tools") and not same_answer(metric, first["answer"], row["answer"]):
                contradictory.add(key)
    dropped = sum(map(len, pools.values())) - sum(map(len, kept.values()))
    return {name: rows for name, rows in kept.items() if rows}, dropped, len(contradictory)


def share_out(pools: Pools, metric: str, sizes: Mapping[str, int], seed: int) -> dict[str, list[Row]]:
    """The four splits. Raises SuiteError if there are fewer rows than `sizes` ask for."""
    if unknown := sorted(set(sizes) - set(SPLITS)):
        raise SuiteError(f"unknown split {unknown[0]} in sizes; allowed: {', '.join(SPLITS)}")
    if bad := [name for name, size in sizes.items() if size < 1]:
        raise SuiteError(f"size of {bad[0]}: {sizes[bad[0]]}; allowed: at least 1")
    home = {
        "test": "test" if "test" in pools else "train",
        "gate": "validation" if "validation" in pools else "train",
        "fitness": "validation" if "validation" in pools else "train",
        "train": "train",
    }
    rng = random.Random(f"share out {seed}")
    left = {name: _interleaved(rows, metric, rng) for name, rows in pools.items()}
    have = {name: len(rows) for name, rows in left.items()}
    splits: dict[str, list[Row]] = {}
    for name, pool in home.items():
        available = len(left.get(pool, []))
        size = sizes.get(name, available if name == "train" else _default_size(name, have.get(pool, 0), pool))
        if size > available or size < 1:
            raise SuiteError(
                f"{have.get(pool, 0)} rows of {pool} are too few: split {name} needs {max(size, 1)} and {available} "
                "are left; allowed: smaller sizes or more data"
            )
        splits[name], left[pool] = left[pool][:size], left[pool][size:]
    return {name: splits[name] for name in SPLITS}


def _default_size(split: str, rows: int, pool: str) -> int:
    if pool == "test":
        return min(MOST["test"], rows)
    if pool == "validation":
        share = {"fitness": rows // 4, "gate": rows * 3 // 4}
    else:
        share = {"fitness": rows // 10, "gate": max(rows // 4, min(100, rows // 3)), "test": rows // 4}
    return max(1, min(MOST[split], share[split]))


def _interleaved(rows: Sequence[Row], metric: str, rng: random.Random) -> list[Row]:
    """The rows in random order, but so that every stretch of them holds each group in proportion."""
    shuffled = list(rows)
    rng.shuffle(shuffled)
    groups = [row.get("group") or natural_group(metric, row["answer"]) for row in shuffled]
    totals = Counter(groups)
    seen: Counter[str] = Counter()
    places = []
    for group in groups:
        places.append((seen[group] + rng.random()) / totals[group])
        seen[group] += 1
    return [shuffled[index] for index in sorted(range(len(shuffled)), key=places.__getitem__)]
