"""What a docstring says to a model: its first paragraph, and one description per parameter (Google, NumPy, reST)."""

import inspect
import itertools
import re

_GOOGLE_SECTION = re.compile(r"^(Args|Arguments|Parameters|Params):\s*$")
_GOOGLE_ITEM = re.compile(r"^(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_NUMPY_ITEM = re.compile(r"^(\w+(?:\s*,\s*\w+)*)\s*(?::.*)?$")
_REST_ITEM = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)$")
_HEADING = re.compile(
    r"^(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|See Also|Attributes|Warnings?):?\s*$"
)


def description(docstring: str | None) -> str:
    """The first paragraph on one line; empty without a docstring."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring or "").splitlines():
        if not line.strip() or line.startswith(":") or (_HEADING.match(line) and not lines):
            break
        lines.append(line.strip())
    return " ".join(lines)


def parameter_descriptions(docstring: str | None) -> dict[str, str]:
    """{parameter: its description on one line} for those that the docstring describes."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    return {**_rest(lines), **_google(lines), **_numpy(lines)}


def _rest(lines: list[str]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in lines:
        if match := _REST_ITEM.match(line.strip()):
            current = found.setdefault(match[1], [])
            current.append(match[2])
        elif current is not None and line.strip() and not line.strip().startswith(":") and line[:1].isspace():
            current.append(line.strip())
        else:
            current = None
    return _joined(found)


def _google(lines: list[str]) -> dict[str, str]:
    start = next((number for number, line in enumerate(lines) if _GOOGLE_SECTION.match(line)), None)
    if start is None:
        return {}
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    indent = None
    for line in lines[start + 1 :]:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = depth if indent is None else indent
        match = _GOOGLE_ITEM.match(line.strip())
        if depth <= indent and match:
            current = found.setdefault(match[1], [])
            current.append(match[2])
        elif current is not None:
            current.append(line.strip())
    return _joined(found)


def _numpy(lines: list[str]) -> dict[str, str]:
    start = next(
        (
            number
            for number, (line, under) in enumerate(itertools.pairwise(lines))
            if line.strip() in ("Parameters", "Other Parameters") and re.fullmatch(r"-{3,}", under.strip())
        ),
        None,
    )
    if start is None:
        return {}
    found: dict[str, list[str]] = {}
    current: list[list[str]] = []
    body = lines[start + 2 :]
    for number, line in enumerate(body):
        if number + 1 < len(body) and re.fullmatch(r"-{3,}", body[number + 1].strip()):
            break
        if line[:1].isspace():
            for part in current:
                part.append(line.strip())
        elif match := _NUMPY_ITEM.match(line):
            current = [found.setdefault(name.strip(), []) for name in match[1].split(",")]
    return _joined(found)


def _joined(found: dict[str, list[str]]) -> dict[str, str]:
    return {name: text for name, parts in found.items() if (text := " ".join(part for part in parts if part))}
