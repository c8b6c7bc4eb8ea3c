"""When two values are the same: as JSON, and as arguments of a tool call with sets of accepted values."""

from typing import Any


def same_json(left: Any, right: Any) -> bool:
    """Equal as JSON: 5 and 5.0 are one number, true is not 1, the order of keys does not matter."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_json(value, right[key]) for key, value in left.items())
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_json, left, right))
    return bool(left == right)


def accepts(expected: Any, given: Any) -> bool:
    """Whether a call's value is accepted.

    {"any": [...]} accepts each of its values; in a dict, an `any` with "" or null may be left out. Strings compare
    without case and outer whitespace, 5 equals 5.0, lists element by element, dicts key by key.
    """
    if is_any(expected):
        return any(accepts(value, given) for value in expected["any"])
    if isinstance(expected, dict):
        return isinstance(given, dict) and accepts_arguments(expected, given)
    if isinstance(expected, list):
        return isinstance(given, list) and len(given) == len(expected) and all(map(accepts, expected, given))
    if isinstance(expected, str) and isinstance(given, str):
        return expected.strip().casefold() == given.strip().casefold()
    return same_json(expected, given)


def accepts_arguments(expected: dict[str, Any], given: dict[str, Any]) -> bool:
    """`accepts` for every argument: none unexpected, none missing that may not be left out."""
    return not given.keys() - expected.keys() and all(
        accepts(value, given[key]) if key in given else may_be_left_out(value) for key, value in expected.items()
    )


def is_any(expected: Any) -> bool:
    """Whether `expected` is a set of accepted values."""
    return isinstance(expected, dict) and expected.keys() == {"any"} and isinstance(expected["any"], list)


def may_be_left_out(expected: Any) -> bool:
    """Whether an argument with this expectation is optional."""
    return is_any(expected) and any(value is None or value == "" for value in expected["any"])


def first_accepted(expected: Any) -> Any:
    """The first accepted value, nested ones included; None for an argument whose first choice is to be left out."""
    if is_any(expected):
        first = expected["any"][0]
        return None if first == "" else first_accepted(first)
    if isinstance(expected, dict):
        return first_arguments(expected)
    return [first_accepted(value) for value in expected] if isinstance(expected, list) else expected


def first_arguments(expected: dict[str, Any]) -> dict[str, Any]:
    """The first accepted value of every argument, without those whose first choice is to be left out."""
    chosen = {key: first_accepted(value) for key, value in expected.items()}
    return {key: value for key, value in chosen.items() if value is not None or not may_be_left_out(expected[key])}


def has_choice(expected: Any) -> bool:
    """Whether every set of accepted values in `expected` holds at least one."""
    if is_any(expected):
        return bool(expected["any"]) and all(map(has_choice, expected["any"]))
    if isinstance(expected, dict):
        return all(map(has_choice, expected.values()))
    return all(map(has_choice, expected)) if isinstance(expected, list) else True
