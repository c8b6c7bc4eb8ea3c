"""The six metrics: each turns (answer, text, item) into a score between 0 and 1 and never fails on any text."""

import hashlib
import importlib
import importlib.util
import json
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from agentlab.errors import SuiteError
from agentlab.tasks.items import Item
from agentlab.tasks.matching import accepts_arguments, same_json
from agentlab.toolformat import decode_json, parse_calls

Checker = Callable[[Any, str, Item], float]
METRICS = ("exact", "number", "label", "json", "tool_call")
DEFAULT_TOLERANCE = 1e-6
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])-)?\s?[$€£¥]?\s?(?P<inner>(?<=[$€£¥])-)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)(?P<power>[eE][+-]?\d{1,3}\b)?"
)
_UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # scripts without word boundaries


def make_checker(metric: str, labels: Sequence[str], tolerance: float, folder: Path | None) -> Checker:
    """The checker for `metric`, a built-in name or a function's dotted name.

    Raises SuiteError for a name that is neither.
    """
    if metric == "number":
        return lambda answer, text, item: float(numbers_agree(answer, text, tolerance))
    if metric == "label":
        find = label_finder(labels)
        return lambda answer, text, item: float(find(text) == {answer})
    simple: dict[str, Checker] = {"exact": _exact, "json": _json, "tool_call": _tool_call}
    if metric in simple:
        return simple[metric]
    if "." not in metric and ":" not in metric:
        raise SuiteError(
            f"unknown metric {metric}; allowed: {', '.join(METRICS)} or a function's dotted name "
            "like package.module:function"
        )
    return _function(metric, folder)


def plain(text: str) -> str:
    """`text` without what `exact` overlooks: case, runs of whitespace, quotes around it, a closing . or !"""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip("\"'`“”‘’ ").rstrip(".!。！ ").strip("\"'`“”‘’ ")


def _exact(answer: Any, text: str, item: Item) -> float:
    accepted = answer if isinstance(answer, list) else [answer]
    given = plain(text)
    return float(bool(given) and any(given == plain(str(value)) for value in accepted))


def last_number(text: str) -> float | None:
    """The last number written in digits: 1,234 and -3 and $5 and 50% (= 50) and 1.5e3; None without one."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    last = found[-1]
    value = float(last["digits"].replace(",", "") + (last["power"] or ""))
    if not math.isfinite(value):
        return None
    return -value if last["sign"] or last["inner"] else value


def numbers_agree(answer: float | str, text: str, tolerance: float) -> bool:
    """Whether the last number in `text` is the answer's; an answer that is a text means its own last number."""
    expected = last_number(answer) if isinstance(answer, str) else float(answer)
    given = last_number(text)
    if expected is None or given is None:
        return False
    return math.isclose(given, expected, rel_tol=1e-9, abs_tol=tolerance)


def same_answer(metric: str, one: Any, other: Any) -> bool:
    """Whether two answers to one prompt agree, as far as `metric` can tell."""
    if metric == "exact":
        texts = [
            {plain(str(text)) for text in (given if isinstance(given, list) else [given])} for given in (one, other)
        ]
        return bool(texts[0] & texts[1])
    if metric == "number" and last_number(str(one)) is not None:
        return numbers_agree(str(one), str(other), DEFAULT_TOLERANCE)
    return same_json(one, other)


def label_key(label: str) -> str:
    """A label as texts are searched for it: without case, with a space for _ and - between its words."""
    folded = unicodedata.normalize("NFKC", label).casefold()
    return re.sub(r"(?<=[^\W_])[-_\s]+(?=[^\W_])", " ", folded).strip()


def label_finder(labels: Sequence[str]) -> Callable[[str], set[str]]:
    """A function that gives the labels a text states, as whole words; of overlapping ones the longest counts."""
    by_key = {label_key(label): label for label in labels}
    if not by_key:
        return lambda text: set()
    longest_first = sorted(by_key, key=len, reverse=True)
    pattern = re.compile("|".join(_bounded(key) for key in longest_first))
    return lambda text: {by_key[found] for found in pattern.findall(label_key(text))}


def _bounded(key: str) -> str:
    before = r"(?<!\w)" if _is_word(key[:1]) else ""
    after = r"(?!\w)" if _is_word(key[-1:]) else ""
    return before + re.escape(key) + after


def _is_word(character: str) -> bool:
    return bool(re.match(r"\w", character)) and not _UNSPACED.match(character)


def _json(answer: Any, text: str, item: Item) -> float:
    found = json_values(text, "[" if isinstance(answer, list) else "{" if isinstance(answer, dict) else "")
    return float(bool(found) and all(same_json(answer, value) for value in found))


def json_values(text: str, opener: str) -> list[Any]:
    """The JSON values in `text` that begin with `opener`, outermost ones only; without opener the whole text as one."""
    text = text.strip()
    try:
        value, end = decode_json(text)
        if not text[end:].strip():
            return [value]
    except ValueError:
        pass
    values: list[Any] = []
    start = text.find(opener) if opener else -1
    while start >= 0:
        try:
            value, start = decode_json(text, start)
            values.append(value)
        except ValueError:
            start += 1
        start = text.find(opener, start)
    return values


def _tool_call(answer: Any, text: str, item: Item) -> float:
    calls = parse_calls(text)
    if answer is None:
        return float(bool(text.strip()) and not calls and not _names_a_call(text, item))
    if len(calls) != 1 or calls[0].malformed or calls[0].name != answer["name"]:
        return 0.0
    return float(accepts_arguments(answer["arguments"], calls[0].arguments))


def _names_a_call(text: str, item: Item) -> bool:
    names = "|".join(re.escape(str(tool["name"])) for tool in item.tools)
    return bool(names) and re.search(rf"(?<!\w)(?:{names})\s*\(", text) is not None


def _function(name: str, folder: Path | None) -> Checker:
    module, function_name = load_function_module(name, folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SuiteError(f"metric {name}: module {module.__name__} has no function {function_name}")

    def check(answer: Any, text: str, item: Item) -> float:
        try:
            score = float(function(answer, text, item))
        except Exception as error:  # a person's code may raise anything
            raise SuiteError(f"metric {name} failed on item {item.id}: {type(error).__name__}: {error}") from error
        if not 0.0 <= score <= 1.0:
            raise SuiteError(f"metric {name} gave {score} on item {item.id}; allowed: 0 to 1")
        return score

    return check


def load_function_module(name: str, folder: Path | None) -> tuple[ModuleType, str]:
    """The module of a metric's dotted name and the function's name; a file in the suite's own folder comes first."""
    module_name, _, function_name = name.partition(":") if ":" in name else name.rpartition(".")
    file = folder / (module_name.replace(".", "/") + ".py") if folder else None
    try:
        if file is None or not file.is_file():
            return importlib.import_module(module_name), function_name
        # Two suites may both bring a metric.py: the module's name is made from the whole path.
        unique = f"agentlab_metric_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(unique, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[unique] = module
        spec.loader.exec_module(module)
    except Exception as error:  # importing runs a person's code
        raise SuiteError(f"metric {name} cannot be imported: {type(error).__name__}: {error}") from error
    return module, function_name


def written_answer(metric: str, answer: Any) -> str:
    """A plain answer as text to train on (`tool_call` has its own rendering)."""
    if metric == "exact" and isinstance(answer, list):
        return str(answer[0])
    if isinstance(answer, str) and metric != "json":
        return answer
    if metric == "number" and isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        return str(int(answer))
    return json.dumps(answer, ensure_ascii=False)
