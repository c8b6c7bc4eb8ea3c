"""A tool's parameters as a grammar (EBNF) of the JSON that fits them; what xgrammar cannot compile is loosened."""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# xgrammar reads these and writes a grammar for them; others it ignores, refuses, or (`allOf`) reads in part.
_KEYWORDS = {
    "$defs",
    "$ref",
    "additionalProperties",
    "anyOf",
    "const",
    "definitions",
    "enum",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maximum",
    "maxItems",
    "maxLength",
    "minimum",
    "minItems",
    "minLength",
    "multipleOf",
    "pattern",
    "prefixItems",
    "properties",
    "required",
    "type",
}
_BY_NAME = ("properties", "$defs", "definitions")  # keywords whose values are schemas by name
# Dropped one after the other until the rest compiles.
_FRAGILE = (
    ("pattern", "format"),
    ("multipleOf",),
    ("minLength", "maxLength", "minItems", "maxItems"),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("prefixItems",),
    ("enum", "const"),
)
# xgrammar's grammars of other formats allow text that is no JSON string.
_FORMATS = ("date", "date-time", "duration", "hostname", "ipv4", "time", "uri", "uuid")
_HEX = "[0-9A-Fa-f]"
# Narrower than xgrammar's: no half of a surrogate pair, no number that is infinite or longer than a float's digits.
_NARROWER = {
    "basic_escape": f'(([\\"\\\\/bfnrt]) | ("u" ([0-9A-Ca-cE-Fe-f] {_HEX} | [Dd] [0-7]) {_HEX} {_HEX}))',
    "basic_integer": '(("0") | (basic_integer_1 [1-9] [0-9]{0, 15}))',
    "basic_number_2": '(("0") | ([1-9] [0-9]{0, 15}))',
    "basic_number_3": '("" | ("." basic_number_digits{1, 15}))',
    "basic_number_5": '("" | ([eE] basic_number_4 basic_number_digits{1, 2}))',
}


def object_grammar(parameters: Mapping[str, Any]) -> str:
    """EBNF with the rule `root` for the JSON object of a call's arguments, as json.dumps writes it.

    An object holds the properties of its schema in their order, no others; one without properties is free.
    """
    return _object_grammar(json.dumps(parameters, ensure_ascii=False))


@functools.lru_cache(maxsize=1024)
def _object_grammar(text: str) -> str:
    schema = {"type": "object", "properties": {}, **json.loads(text)}
    clean = _normal({**schema, "additionalProperties": schema.get("additionalProperties", False)})
    for candidate in _loosened(clean):
        try:
            return _ebnf(candidate)
        except (RuntimeError, ValueError, TypeError):
            continue
    return _ebnf({"type": "object"})


def _ebnf(schema: Mapping[str, Any]) -> str:
    import xgrammar

    text = json.dumps(schema, ensure_ascii=False)
    grammar = str(xgrammar.Grammar.from_json_schema(text, any_whitespace=False, separators=(", ", ": ")))
    narrowed = "\n".join(_narrowed(*line.partition(" ::= ")) for line in grammar.splitlines())
    xgrammar.Grammar.from_ebnf(narrowed)
    return narrowed


def _narrowed(rule: str, arrow: str, body: str) -> str:
    if body == r"(([^\"\\\r\n]))":  # a string with a length: xgrammar forgets the control characters
        body = r"(([^\0-\x1f\"\\\r\n]))"
    elif '\\"' not in body:  # a number with limits, not a text that looks like its grammar
        body = re.sub(r"\[1-9\] (\w+)\{1, -1\}", r"[1-9] \1{1, 15}", body).replace("[1-9] [0-9]*", "[1-9] [0-9]{0, 15}")
    return rule + arrow + _NARROWER.get(rule, body)


def _normal(schema: Any) -> Any:
    """The schema in the keywords that xgrammar knows; what it would silently read as "nothing allowed" is opened."""
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) == 1 and isinstance(schema["allOf"][0], dict):
        schema = {**schema, **schema["allOf"][0]}
    if "oneOf" in schema:
        schema = {"anyOf": schema["oneOf"], **schema}
    found = {key: _normal_value(key, value) for key, value in schema.items() if key in _KEYWORDS}
    if found.get("format") not in _FORMATS:
        found.pop("format", None)
    if "properties" in found:
        found.setdefault("type", "object")
        found.pop("anyOf", None)  # of the two, xgrammar would read the alternatives alone
    kind = found.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if "array" in kinds and "items" not in found and "prefixItems" not in found:
        found["items"] = True
    if "object" in kinds and "properties" not in found:
        found.setdefault("additionalProperties", True)
    if "anyOf" in found and "type" in found:
        kind = found.pop("type")
        found["anyOf"] = [{"type": kind, **inner} if isinstance(inner, dict) else inner for inner in found["anyOf"]]
    if found.keys() & {"enum", "const"}:  # nothing else is needed, and beside it nothing else is read
        values = found.get("enum", [found.get("const")])
        return {"enum": [value for value in values if _of_type(value, kinds)] or values}
    return found


def _normal_value(key: str, value: Any) -> Any:
    if key in _BY_NAME:
        return {name: _normal(inner) for name, inner in value.items()}
    if key in ("anyOf", "prefixItems"):
        return [_normal(inner) for inner in value]
    return _normal(value) if key in ("items", "additionalProperties") else value


def _of_type(value: Any, kinds: list[Any]) -> bool:
    names: dict[str, Any] = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    if kinds == [None]:
        return True
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number" in kinds or ("integer" in kinds and float(value).is_integer())
    return any(isinstance(value, names[kind]) for kind in kinds if kind in names)


def _loosened(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema, then ever looser ones: fragile keywords dropped where they do not compile, then whole properties."""
    yield schema
    root: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    loose = {**schema, "properties": {n: _loosest(p, root) for n, p in schema["properties"].items()}}
    yield loose
    for dropped in range(1, len(_FRAGILE) + 1):
        yield _without(loose, {key for group in _FRAGILE[:dropped] for key in group})
    bare = {name: _bare(inner) for name, inner in schema["properties"].items()}
    yield {"type": "object", "properties": bare, "required": schema.get("required", []), "additionalProperties": False}
    yield {**schema, "properties": dict.fromkeys(bare, True), "additionalProperties": False}


def _loosest(inner: Any, root: Mapping[str, Any]) -> Any:
    """One property as strict as it compiles."""
    candidates = [inner]
    for dropped in range(1, len(_FRAGILE) + 1):
        candidates.append(_without(inner, {key for group in _FRAGILE[:dropped] for key in group}))
    for candidate in [*candidates, _bare(inner)]:
        try:
            _ebnf({"type": "object", "properties": {"x": candidate}, "required": ["x"], **root})
        except (RuntimeError, ValueError, TypeError):
            continue
        return candidate
    return True


def _without(schema: Any, keys: set[str]) -> Any:
    if isinstance(schema, list):
        return [_without(item, keys) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {n: _without(s, keys) for n, s in value.items()} if key in _BY_NAME else _without(value, keys)
        for key, value in schema.items()
        if key not in keys
    }


def _bare(schema: Any) -> Any:
    """A property's type alone."""
    if not isinstance(schema, dict) or "type" not in schema:
        return True
    return _normal({"type": schema["type"]})
