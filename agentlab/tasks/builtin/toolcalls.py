"""`toolcalls`: choose among four tools and copy the arguments out of the request, or see that no tool applies.

Small on purpose: a 135M model learns it in a few dozen steps, every item shows the same four tools, and a prompt stays
near 100 tokens. Every argument is written in the request as it goes into the call: no world knowledge, no arithmetic,
no conversion of units.
"""

import random
from functools import partial
from typing import Any

from agentlab.tasks.builtin.making import Made, distinct
from agentlab.tasks.builtin.toolcalls_words import ENTITIES, TEMPLATES


def _tool(name: str, **arguments: Any) -> dict[str, Any]:
    properties = {key: kind if isinstance(kind, dict) else {"type": kind} for key, kind in arguments.items()}
    return {
        "name": name,
        "description": "",
        "parameters": {"type": "object", "properties": properties, "required": list(arguments)},
    }


TOOLS = {
    tool["name"]: tool
    for tool in (
        _tool("weather", city="string", days="integer"),
        _tool("convert", amount="number", to="string"),
        _tool("music", artist="string", order={"enum": ["shuffle", "album"]}),
        _tool("light", room="string", on="boolean"),
    )
}
CONFIG = {"name": "toolcalls", "metric": "tool_call", "tools": list(TOOLS.values()), "license": "Apache-2.0"}
ABSENT = {
    "timer": ("minutes", "label"),
    "event": ("title", "hour"),
    "message": ("to", "text"),
    "split": ("total", "people"),
}
"""Tools that people ask for and that are not in the catalogue."""
CONVERSIONS = {"integer": int, "number": float}
FIXED = {"order": ["shuffle", "album"], "on": ["on", "off"]}
"""Arguments whose values the schema fixes: they are the same in every split."""


def make(split: str, count: int) -> list[Made]:
    """The items of one split: every tool equally often; no tool can do one item in eight, in train one in four.

    A few dozen training items have to teach restraint as well as calling.
    """
    every = 4 if split == "train" else 8
    return distinct(split, count, "toolcalls", partial(_one, every))


def _one(every: int, rng: random.Random, pool: str, number: int) -> Made:
    names = sorted(TOOLS)
    if number % every != every - 1:
        return _call(rng, pool, names[(number - number // every) % len(names)])
    if number // every % 2:  # something to talk about
        template = rng.choice(TEMPLATES["talk"][pool])
        words = {"topic": rng.choice(ENTITIES["topic"][pool])}
    else:  # something to do, but with a tool that is not there
        absent = rng.choice(sorted(ABSENT))
        template = rng.choice(TEMPLATES[absent][pool])
        words = {argument: rng.choice(ENTITIES[f"{absent}.{argument}"][pool]) for argument in ABSENT[absent]}
    return Made(template.format(**words), None, template, tuple(words.values()))


def _call(rng: random.Random, pool: str, name: str) -> Made:
    template = rng.choice(TEMPLATES[name][pool])
    words = {}
    arguments: dict[str, Any] = {}
    for argument, schema in TOOLS[name]["parameters"]["properties"].items():
        word = rng.choice(FIXED[argument] if argument in FIXED else ENTITIES[f"{name}.{argument}"][pool])
        words[argument] = word
        arguments[argument] = word == "on" if argument == "on" else CONVERSIONS.get(schema.get("type"), str)(word)
    entities = tuple(word for argument, word in words.items() if argument not in FIXED)
    return Made(template.format(**words), {"name": name, "arguments": arguments}, template, entities)
