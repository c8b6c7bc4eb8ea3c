"""The built-in suites, generated in memory from fixed seeds."""

import functools
import importlib
import json
from typing import Any

from agentlab.tasks.builtin.making import COUNTS, Made
from agentlab.tasks.items import SPLITS
from agentlab.tasks.suite import Suite

BUILT_IN = ("toolcalls", "arithmetic", "extraction")


@functools.cache
def made(name: str) -> dict[str, list[Made]]:
    """Each split's made items, with the template and the entities they were made from."""
    module = importlib.import_module(f"agentlab.tasks.builtin.{name}")
    return {split: module.make(split, COUNTS[split]) for split in SPLITS}


def content(name: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What the suite's folder would hold: the settings of suite.yaml and the items of each split."""
    config: dict[str, Any] = importlib.import_module(f"agentlab.tasks.builtin.{name}").CONFIG
    splits = {
        split: [item.line(f"{name}-{split}-{number:03d}") for number, item in enumerate(items)]
        for split, items in made(name).items()
    }
    return json.loads(json.dumps(config)), splits


@functools.cache
def build(name: str) -> Suite:
    """The validated built-in suite."""
    from agentlab.tasks.reading import build_suite

    config, splits = content(name)
    return build_suite(
        config,
        {
            split: [(f"{name}, {split}, item {n}", line) for n, line in enumerate(lines)]
            for split, lines in splits.items()
        },
        None,
    )
