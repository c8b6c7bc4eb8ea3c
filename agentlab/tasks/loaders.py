"""A suite's folder out of other people's data."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from agentlab.errors import SuiteError
from agentlab.tasks.checkers import label_key, last_number
from agentlab.tasks.items import SPLITS
from agentlab.tasks.public import from_bfcl, from_clinc150, from_gsm8k
from agentlab.tasks.reading import build_suite, read_suite
from agentlab.tasks.sharing import drop_duplicates, share_out
from agentlab.tasks.sources import PlacedRow, Pools, Row, read_pools
from agentlab.tasks.suite import Suite
from agentlab.tasks.writing import new_folder, write_suite

Format = Literal["auto", "gsm8k", "clinc150", "bfcl", "jsonl", "csv", "hub"]
FORMATS = ("auto", "gsm8k", "clinc150", "bfcl", "jsonl", "csv", "hub")
PROMPT_COLUMNS = ("prompt", "messages", "question", "text", "input", "instruction", "utterance")
ANSWER_COLUMNS = ("answer", "label", "target", "output", "response", "intent", "completion")


def make_suite(
    source: str,
    out: Path,
    *,
    format: Format = "auto",
    metric: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    labels: Sequence[str] | None = None,
    system: str | None = None,
    license: str | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 7,
    test_source: str | None = None,
) -> Suite:
    """The validated suite written into the new folder `out`; `warnings` say what was dropped.

    `source` is a file (.jsonl, .json, .csv, .tsv), a folder with a saved Hugging Face data set or with its files, the
    folder of GSM8K, CLINC150 or BFCL with that format, or with format "hub" a name on the Hugging Face hub
    (`name` or `name:configuration`), the only case that uses the network. Splits that the source has are kept: `test`
    comes from its test split (or from `test_source`), `fitness` and `gate` from its validation split; what it lacks is
    drawn from its train split with `seed`, every group in proportion. `sizes` may name any of the four splits.
    `metric` and columns are guessed from the data where not given; `labels` default to those in the data, and choose
    the intents of CLINC150. A prompt that occurs twice is dropped, from train first. Raises SuiteError.
    """
    if format not in FORMATS:
        raise SuiteError(f"unknown format {format}; allowed: {', '.join(FORMATS)}")
    with new_folder(out):
        pass  # before the work of reading
    config, pools = _read(source, format, labels, metric, prompt_column, answer_column, test_source)
    settings: dict[str, Any] = {"name": out.name, **config}
    settings |= {key: value for key, value in {"system": system, "license": license}.items() if value is not None}
    pools, dropped, contradictory = drop_duplicates(pools, settings["metric"])
    splits = share_out(pools, settings["metric"], sizes or {}, seed)
    lines = {name: [(_place(row, f"{source}, item {row['id']}"), row) for row in splits[name]] for name in SPLITS}
    build_suite(settings, lines, None, source)
    counts = {name: len(rows) for name, rows in splits.items()}
    record = {
        "source": source,
        "format": format,
        "seed": seed,
        "items": counts,
        "dropped_duplicates": dropped,
        "contradictory_prompts": contradictory,
    }
    write_suite(settings, splits, out, record)
    suite = read_suite(out)
    if dropped:
        warning = f"{dropped} items dropped: the same prompt occurs twice"
        if contradictory:
            warning += (
                f"; prompts with contradictory answers: {contradictory}, of each the first answer is kept "
                "(the test split's before validation's before train's)"
            )
        return replace(suite, warnings=[*suite.warnings, warning])
    return suite


def _read(
    source: str,
    format: str,
    labels: Sequence[str] | None,
    metric: str | None,
    prompt_column: str | None,
    answer_column: str | None,
    test_source: str | None,
) -> tuple[dict[str, Any], Pools]:
    if format in ("gsm8k", "clinc150", "bfcl"):
        given = {"metric": metric, "prompt_column": prompt_column, "answer_column": answer_column, "test": test_source}
        if extra := [name for name, value in given.items() if value is not None]:
            raise SuiteError(f"format {format} brings its own {extra[0]}; leave that option out")
        if labels is not None and format != "clinc150":
            raise SuiteError(f"format {format} has no labels; leave that option out")
        folder = Path(source).expanduser()
        if format == "clinc150":
            return from_clinc150(folder, labels)
        return from_gsm8k(folder) if format == "gsm8k" else from_bfcl(folder)
    pools = read_pools(source, format)
    if test_source is not None:
        other = read_pools(test_source, format)
        tests = other.get("test") or other.get("train")
        if not tests:
            raise SuiteError(
                f"{test_source} has neither a test nor a train split; it has: {', '.join(other) or 'none'}"
            )
        pools = {**pools, "test": tests}
    rows = [row for part in pools.values() for row in part]
    if not rows:
        raise SuiteError(f"{source} has no rows")
    prompt = _column(rows[0], prompt_column, PROMPT_COLUMNS, "prompt", source)
    answer = _column(rows[0], answer_column, ANSWER_COLUMNS, "answer", source)
    for row in rows:
        for column in (prompt, answer):
            if column not in row:
                raise SuiteError(f"{_place(row, source)} lacks column {column}; it has {', '.join(map(str, row))}")
    metric = metric or guess_metric([row[answer] for row in rows])
    result = {
        name: [_line(f"{name}-{n:05d}", row, prompt, answer, metric) for n, row in enumerate(part)]
        for name, part in pools.items()
    }
    config: dict[str, Any] = {"metric": metric}
    if metric == "label":
        config["labels"] = list(labels or _labels([line for part in result.values() for line in part]))
    elif labels is not None:
        raise SuiteError(f"labels belong to metric label, not to {metric}")
    return config, result


def _place(row: Row, otherwise: str) -> str:
    return row.place if isinstance(row, PlacedRow) else otherwise


def _labels(lines: Sequence[Row]) -> list[str]:
    first: dict[str, Row] = {}
    for line in lines:
        other = first.setdefault(label_key(line["answer"]), line)
        if other["answer"] != line["answer"]:
            raise SuiteError(
                f"{_place(line, line['id'])}: label {line['answer']} cannot be told apart from {other['answer']} in "
                f"{_place(other, other['id'])}; write both alike"
            )
    return sorted(line["answer"] for line in first.values())


def _column(row: Row, given: str | None, usual: Sequence[str], what: str, source: str) -> str:
    if given is not None and given not in row:
        raise SuiteError(f"{source} has no column {given}; allowed: {', '.join(map(str, row))}")
    found = given or next((name for name in usual if name in row), None)
    if found is None:
        raise SuiteError(f"{source}: which column is the {what}? Name one of {', '.join(map(str, row))}")
    return found


def guess_metric(answers: Sequence[Any]) -> str:
    """`json` for objects and lists, `number` for numbers, `label` for few texts that repeat, else `exact`."""
    if all(isinstance(answer, dict | list) for answer in answers):
        return "json"
    texts = [str(answer).strip() for answer in answers]
    if all(re.fullmatch(r"[-+]?[$]?[\d,]*\.?\d+%?", text) for text in texts):
        return "number"
    distinct = len(set(texts))
    return "label" if 2 <= distinct <= 200 and len(texts) >= 5 * distinct else "exact"


def _line(identity: str, row: Row, prompt: str, answer: str, metric: str) -> Row:
    place = _place(row, f"row {identity}")
    if row[answer] is None and metric != "tool_call":
        raise SuiteError(f"{place} has no answer in column {answer}")
    if metric == "label" and not label_key(str(row[answer])):
        raise SuiteError(f"{place}: column {answer} is {row[answer]!r}; allowed for a label: a text that is not empty")
    key = "messages" if isinstance(row[prompt], list) else "prompt"
    if key == "prompt" and not isinstance(row[prompt], str):
        raise SuiteError(f"{place}: column {prompt} must be a text or a list of messages: {row[prompt]!r}")
    line: Row = {"id": identity, key: row[prompt], "answer": _answer(row[answer], metric)}
    if metric == "tool_call" and row.get("tools") is not None:
        line["tools"] = _parsed(row["tools"])
    return PlacedRow(line, place)


def _answer(value: Any, metric: str) -> Any:
    if metric in ("json", "tool_call"):
        return _parsed(value)
    if metric == "label":
        return str(value).strip()
    if metric == "exact":
        return value if isinstance(value, list) else str(value)
    if metric == "number" and isinstance(value, str) and last_number(value) is not None:
        return value.strip()
    return value


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
