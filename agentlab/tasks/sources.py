"""Rows out of JSONL, JSON and CSV files and Hugging Face datasets, by the splits the source itself has."""

import csv
import json
from pathlib import Path
from typing import Any

from agentlab.errors import SuiteError

Row = dict[str, Any]


class PlacedRow(Row):
    """A row that knows where its source has it, like "data.csv, line 7", for messages."""

    def __init__(self, values: Row, place: str) -> None:
        super().__init__(values)
        self.place = place


Pools = dict[str, list[Row]]
"""Rows by the source's own splits, named train, validation or test; a source without splits is all "train"."""
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read_pools(source: str, format: str) -> Pools:
    """The rows of `source`. Only format "hub" may use the network. Raises SuiteError."""
    if format == "hub":
        return _from_hub(source)
    path = Path(source).expanduser()
    if not path.exists():
        raise SuiteError(f"no file or folder {source}; a data set on the Hugging Face hub needs format hub")
    if path.is_dir():
        return _from_folder(path)
    suffix = format if format != "auto" else path.suffix.lstrip(".").lower()
    try:
        if suffix in ("jsonl", "ndjson"):
            return {"train": read_jsonl(path)}
        if suffix == "json":
            return _from_json(path)
        if suffix in ("csv", "tsv"):
            return {"train": _from_csv(path, "\t" if suffix == "tsv" else ",")}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SuiteError(f"cannot read {path}: {error}") from None
    raise SuiteError(f"{path}: unknown kind of file; allowed: .jsonl, .json, .csv, .tsv, or name its format")


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a JSONL file. Raises SuiteError naming the line that is none."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SuiteError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise SuiteError(f"{path}, line {number} is not a JSON object")
        rows.append(PlacedRow(row, f"{path}, line {number}"))
    return rows


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises SuiteError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SuiteError(f"cannot read {path}: {error}") from None


def _from_json(path: Path) -> Pools:
    value = read_json(path)
    if isinstance(value, dict):
        pools = {_SPLIT_NAMES[name]: rows for name, rows in value.items() if name in _SPLIT_NAMES}
        value = pools or value.get("data")
    pools = value if isinstance(value, dict) else {"train": value}
    for rows in pools.values():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise SuiteError(
                f"{path} holds no rows; allowed: a list of objects, or an object of splits with such lists"
            )
    return {
        name: [PlacedRow(row, f"{path}, row {number} of {name}") for number, row in enumerate(rows, start=1)]
        for name, rows in pools.items()
    }


def _from_csv(path: Path, delimiter: str) -> list[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                raise SuiteError(f"{path}, line {reader.line_num} has not as many cells as the first line")
            rows.append(PlacedRow(row, f"{path}, line {reader.line_num}"))
    return rows


def _from_folder(path: Path) -> Pools:
    import datasets

    try:
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        return _rows(datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path)), str(path))
    except Exception as error:  # the library raises many kinds
        raise SuiteError(f"{path} is not a data set: {type(error).__name__}: {_first_line(error)}") from None


def _from_hub(source: str) -> Pools:
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # without a network it tells of every retry
    name, _, configuration = source.partition(":")
    try:
        return _rows(datasets.load_dataset(name, configuration or None), source)
    except Exception as error:  # the library raises many kinds
        raise SuiteError(
            f"data set {source} cannot be loaded from the hub: {type(error).__name__}: {_first_line(error)} "
            "(write name or name:configuration)"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


def _rows(loaded: Any, source: str) -> Pools:
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    pools: Pools = {}
    for name, split in splits.items():
        if name in _SPLIT_NAMES:
            names = {key: feature.names for key, feature in split.features.items() if hasattr(feature, "names")}
            pools[_SPLIT_NAMES[name]] = [
                PlacedRow(_named(dict(row), names), f"{source}, row {number} of {name}")
                for number, row in enumerate(split, start=1)
            ]
    if not pools:
        raise ValueError(f"splits {', '.join(splits)}; needed: train, validation or test")
    return pools


def _named(row: Row, names: dict[str, list[str]]) -> Row:
    for key, labels in names.items():
        if isinstance(row[key], int) and row[key] >= 0:
            row[key] = labels[row[key]]
    return row
