"""From a suite's folder to a validated `Suite`: every refusal is one sentence that names the file and the line."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from agentlab.errors import SuiteError
from agentlab.files import canonical_digest, parse_yaml, sha256_file
from agentlab.tasks.checkers import (
    DEFAULT_TOLERANCE,
    METRICS,
    label_key,
    load_function_module,
    make_checker,
    same_answer,
)
from agentlab.tasks.item_reader import ItemReader, known_keys
from agentlab.tasks.items import MAX_GROUPS, SPLITS, Item, leak_key
from agentlab.tasks.suite import Suite
from agentlab.toolformat import check_tool

KEYS = ("name", "metric", "system", "tools", "labels", "license", "tolerance")
GATE_ITEMS = 100
Lines = list[tuple[str, Any]]
"""(where, value) of each line: "gate.jsonl, line 3" and the parsed JSON."""


def read_suite(folder: Path) -> Suite:
    """The validated suite in `folder`. Raises SuiteError."""
    config = _read_config(folder / "suite.yaml")
    missing = [name for name in SPLITS if not (folder / f"{name}.jsonl").is_file()]
    if missing:
        raise SuiteError(f"suite {folder} lacks {missing[0]}.jsonl; needed: {', '.join(f'{s}.jsonl' for s in SPLITS)}")
    return build_suite(config, {name: list(_read_lines(folder / f"{name}.jsonl")) for name in SPLITS}, folder)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = parse_yaml(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except FileNotFoundError:
        raise SuiteError(f"{file.parent} is no suite: it lacks suite.yaml") from None
    except (OSError, ValueError) as error:
        raise SuiteError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise SuiteError(f"{file} holds no settings; needed: name and metric")
    return config


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SuiteError(f"{where} is not JSON: {error}") from None


def build_suite(
    config: Mapping[str, Any], splits: Mapping[str, Lines], folder: Path | None, source: str | None = None
) -> Suite:
    """The suite of parsed settings and lines; errors in the settings name `source`, by default the folder's suite.yaml.

    `folder` is None for a suite that is built in or not written yet. Raises SuiteError.
    """
    source = source or (str(folder / "suite.yaml") if folder else f"built-in suite {config.get('name')}")
    _check_config(config, source)
    tolerance = float(config.get("tolerance", DEFAULT_TOLERANCE))
    try:
        checker = make_checker(config["metric"], config.get("labels") or [], tolerance, folder)
    except SuiteError as error:
        raise SuiteError(f"{source}: {error}") from error
    reader = ItemReader(config)
    items = {name: [reader.item(where, raw) for where, raw in splits[name]] for name in SPLITS}
    for name in SPLITS:
        if not items[name]:
            raise SuiteError(f"split {name} of {folder or source} has no items; allowed: at least 1")
    _check_unique(splits, items)
    if len({item.group for name in SPLITS for item in items[name]}) > MAX_GROUPS:
        items = {name: [_regroup(item) for item in items[name]] for name in SPLITS}
    warnings = []
    if len(items["gate"]) < GATE_ITEMS:
        warnings.append(
            f"split gate has {len(items['gate'])} items: with fewer than {GATE_ITEMS} only large gains can be proved"
        )
    warnings += [text for name in SPLITS if (text := _repeats(name, items[name], reader.metric))]
    return Suite(
        name=config["name"],
        metric=reader.metric,
        system=config.get("system"),
        tools=reader.tools,
        labels=reader.labels,
        license=config.get("license"),
        folder=folder,
        digest=_digest(config, splits, reader.metric, folder),
        warnings=warnings,
        _items=items,
        _checker=checker,
    )


def _repeats(split: str, items: list[Item], metric: str) -> str | None:
    by_prompt: dict[str, list[Item]] = {}
    for item in items:
        by_prompt.setdefault(leak_key(item.messages), []).append(item)
    repeated = [same for same in by_prompt.values() if len(same) > 1]
    if not repeated:
        return None
    contradictory = sum(
        any(item.tools == same[0].tools and not same_answer(metric, item.answer, same[0].answer) for item in same[1:])
        for same in repeated
    )
    return (
        f"prompts that occur more than once in split {split}: {len(repeated)}, "
        f"of these with contradictory answers: {contradictory}"
    )


def _digest(config: Mapping[str, Any], splits: Mapping[str, Lines], metric: str, folder: Path | None) -> str:
    code = None
    if metric not in METRICS:
        module, _ = load_function_module(metric, folder)
        code = sha256_file(Path(module.__file__)) if module.__file__ else None
    content = {name: [raw for _, raw in splits[name]] for name in SPLITS}
    return canonical_digest({"suite": dict(config), "items": content, "code": code})


def _regroup(item: Item) -> Item:
    return Item(item.id, item.messages, item.answer, "all", item.tools)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    known_keys(config, KEYS, source)
    for key in ("name", "metric"):
        if not isinstance(config.get(key), str) or not config[key].strip():
            raise SuiteError(f"{source}: key {key} must be a text: {config.get(key)!r}")
    for key in ("system", "license"):
        if not isinstance(config.get(key), str | None):
            raise SuiteError(f"{source}: key {key} must be a text: {config[key]!r}")
    for key in ("tools", "labels"):
        if not isinstance(config.get(key) or [], list):
            raise SuiteError(f"{source}: key {key} must be a list")
    if "tolerance" in config:
        tolerance = config["tolerance"]
        if config["metric"] != "number":
            raise SuiteError(f"{source}: key tolerance belongs to metric number, not to {config['metric']}")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
            raise SuiteError(f"{source}: key tolerance: {tolerance!r}; allowed: a number of at least 0")
    _check_writable(config, source)
    _check_labels(config, source)
    _check_tools(config, source)


def _check_writable(config: Mapping[str, Any], source: str) -> None:
    try:
        canonical_digest(dict(config))
    except UnicodeEncodeError:
        raise SuiteError(f"{source}: text that is not valid Unicode: half of a surrogate pair like \\ud800") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise SuiteError(f"{source}: {error}; allowed: what JSON has (quote a date to make it a text)") from None


def _check_tools(config: Mapping[str, Any], source: str) -> None:
    names = set()
    for tool in config.get("tools") or []:
        if problem := check_tool(tool):
            raise SuiteError(f"{source}: {problem}")
        if tool["name"] in names:
            raise SuiteError(f"{source}: tool {tool['name']} is defined twice")
        names.add(tool["name"])


def _check_labels(config: Mapping[str, Any], source: str) -> None:
    labels = config.get("labels") or []
    keys: dict[str, str] = {}
    for label in labels:
        if not isinstance(label, str):
            raise SuiteError(f"{source}: label {label!r} must be a text (quote it in YAML)")
        if not label_key(label):
            raise SuiteError(f"{source}: label {label!r}; allowed: a text that is not empty")
        if (key := label_key(label)) in keys:
            raise SuiteError(f"{source}: labels {keys[key]} and {label} cannot be told apart")
        keys[key] = label
    if config["metric"] == "label" and len(labels) < 2:
        raise SuiteError(f"{source}: metric label needs key labels with at least 2 labels")


def _check_unique(splits: Mapping[str, Lines], items: Mapping[str, list[Item]]) -> None:
    ids: dict[str, str] = {}
    prompts: dict[str, tuple[str, str]] = {}
    leaks: list[str] = []
    for name in SPLITS:
        for (where, _), item in zip(splits[name], items[name], strict=True):
            if item.id in ids:
                raise SuiteError(f"{where}: id {item.id} is already used in {ids[item.id]}")
            ids[item.id] = where
            first_split, first_where = prompts.setdefault(leak_key(item.messages), (name, where))
            if first_split != name:
                leaks.append(f"{where} repeats {first_where}")
    if leaks:
        more = f" and {len(leaks) - 3} more" if len(leaks) > 3 else ""
        raise SuiteError(f"the same prompt is in two splits: {'; '.join(leaks[:3])}{more}; remove it from one of them")
