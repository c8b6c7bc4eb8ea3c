"""The words of `toolcalls`: phrasings and entities, in pools that have nothing in common (`words/*.yaml`)."""

from importlib import resources
from typing import Any

import yaml

from agentlab.tasks.builtin.making import decimals, integers


def _pool(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath("words", f"{name}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


_POOLS = {name: _pool(name) for name in ("train", "dev", "test")}

TEMPLATES: dict[str, dict[str, list[str]]] = {
    tool: {name: pool["templates"][tool] for name, pool in _POOLS.items()} for tool in _POOLS["train"]["templates"]
}
"""Tool (or "talk": nothing that a tool could do) → pool → phrasings."""

ENTITIES: dict[str, dict[str, list[str]]] = {
    kind: {name: pool["entities"][kind] for name, pool in _POOLS.items()} for kind in _POOLS["train"]["entities"]
} | {
    "weather.days": integers(1, 30),
    "timer.minutes": integers(1, 120),
    "convert.amount": decimals(2, 99),
    "event.hour": integers(0, 23),
    "split.total": decimals(20, 199),
    "split.people": integers(2, 40),
}
""""tool.argument" → pool → values, as they are written in a request."""
