"""Type hints → JSON schema, and JSON values → what the hints promise."""

import copy
import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from agentlab.errors import ToolError

Convert = Callable[[Any], Any]
_PLAIN: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_LISTS: tuple[Any, ...] = (list, tuple, set, frozenset, Sequence)
_DICTS: tuple[Any, ...] = (dict, Mapping)
ALLOWED = "str, int, float, bool, list, dict, tuple, set, Literal, Enum, Optional, TypedDict, dataclass, Any"


class _Unsupported(Exception):
    pass


def of_function(function: Callable[..., Any], descriptions: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(JSON schema object of the parameters, {parameter: its type hint}); raises ToolError for what has no schema."""
    name = getattr(function, "__name__", "a tool")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise ToolError(f"{name}: the signature cannot be read: {error}") from None
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        where = f"{name}: parameter {parameter.name}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ToolError(f"{name}: *{parameter.name} has no schema; allowed: parameters with a name each")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ToolError(f"{where} cannot be given by name; allowed: parameters without / behind them")
        if parameter.name not in hints:
            raise ToolError(f"{where} has no type hint; allowed: {ALLOWED}")
        try:
            schema = of_type(hints[parameter.name])
        except RecursionError:
            raise ToolError(f"{where}: its type holds itself, which has no end; allowed: {ALLOWED}") from None
        except _Unsupported as error:
            raise ToolError(f"{where}: {error} is not a type that JSON can carry; allowed: {ALLOWED}") from None
        if text := descriptions.get(parameter.name):
            schema.setdefault("description", text)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
        else:
            _add_default(schema, parameter.default)
        properties[parameter.name] = schema
    whole: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        whole["required"] = required
    return whole, {key: hints[key] for key in properties}


def _add_default(schema: dict[str, Any], default: Any) -> None:
    """Say the default where JSON can and the schema allows it; `x: int = None` is only optional."""
    import jsonschema  # type: ignore[import-untyped]

    value = _enum_value(default) if isinstance(default, enum.Enum) else default
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return
    if jsonschema.Draft202012Validator(schema).is_valid(plain):
        schema["default"] = plain


def of_type(hint: Any) -> dict[str, Any]:  # noqa: PLR0911 - one line per kind of type reads best
    """The JSON schema of one type hint; raises for a type that JSON cannot carry."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if _hashable(hint) and hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is typing.Annotated:
        texts = [extra for extra in arguments[1:] if isinstance(extra, str)]
        return {**of_type(arguments[0]), **({"description": texts[0]} if texts else {})}
    if origin in (Union, types.UnionType):
        return {"anyOf": [of_type(one) for one in arguments]}
    if origin is Literal:
        return _enumeration(list(arguments))
    if hint in _LISTS or origin in (*_LISTS, Sequence):
        return _list(origin or hint, arguments)
    if hint in _DICTS or origin in _DICTS:
        if arguments and arguments[0] is not str:
            raise _Unsupported(_name(hint))
        return {"type": "object", **({"additionalProperties": of_type(arguments[1])} if arguments else {})}
    if inspect.isclass(hint):
        return _class(hint)
    raise _Unsupported(_name(hint))


def _list(kind: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        schema |= {"prefixItems": [of_type(one) for one in arguments]}
        return schema | {"minItems": len(arguments), "maxItems": len(arguments)}
    if arguments:
        schema["items"] = of_type(arguments[0])
    return schema | ({"uniqueItems": True} if kind in (set, frozenset) else {})


def _class(hint: Any) -> dict[str, Any]:
    if issubclass(hint, enum.Enum):
        return _enumeration([_enum_value(member) for member in hint])
    if typing.is_typeddict(hint):
        fields = typing.get_type_hints(hint)
        required = [name for name in fields if name in hint.__required_keys__]
    elif dataclasses.is_dataclass(hint):
        known = typing.get_type_hints(hint)
        shown = [field for field in dataclasses.fields(hint) if field.init]
        fields = {field.name: known[field.name] for field in shown}
        missing = dataclasses.MISSING
        required = [f.name for f in shown if f.default is missing and f.default_factory is missing]
        try:  # an InitVar, or an __init__ of its own, may want something else
            inspect.signature(typing.cast(Callable[..., Any], hint)).bind(**fields)
        except TypeError as error:
            raise _Unsupported(f"{_name(hint)} (made of its fields: {error})") from None
    else:
        raise _Unsupported(_name(hint))
    schema = {"type": "object", "properties": {name: of_type(inner) for name, inner in fields.items()}}
    return schema | ({"required": required} if required else {}) | {"additionalProperties": False}


def _enumeration(values: list[Any]) -> dict[str, Any]:
    values = [_enum_value(value) if isinstance(value, enum.Enum) else value for value in values]
    if not values or any(type(value) not in _PLAIN for value in values):
        raise _Unsupported(f"a choice of {values!r}")
    kinds = {_PLAIN[type(value)] for value in values}
    return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": values}


def _enum_value(member: enum.Enum) -> Any:
    """What stands for a member: its value where JSON has it, else its name."""
    return member.value if type(member.value) in _PLAIN else member.name


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _name(hint: Any) -> str:
    return str(hint) if get_origin(hint) or not hasattr(hint, "__name__") else str(hint.__name__)


def convert(value: Any, hint: Any) -> Any:  # noqa: PLR0911 - one line per kind of type reads best
    """`value`, which fits the hint's schema, as the hint promises it: 5.0 as int, an enum's value as its member.

    Containers are new objects, so a tool cannot change the arguments that are on record.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is typing.Annotated:
        return convert(value, arguments[0])
    if origin in (Union, types.UnionType):
        return convert(value, _alternative(value, arguments))
    if origin is Literal:
        return next((one for one in arguments if _same(_plain(one), value)), value)
    if isinstance(value, list):
        return _converted_list(value, origin or hint, arguments)
    if isinstance(value, dict):
        return _converted_dict(value, hint, arguments)
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return next((member for member in hint if _same(_enum_value(member), value)), value)
    return value


def _converted_list(value: list[Any], kind: Any, arguments: tuple[Any, ...]) -> Any:
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        items = [convert(one, inner) for one, inner in zip(value, arguments, strict=False)]
    else:
        items = [convert(one, arguments[0] if arguments else Any) for one in value]
    return kind(items) if kind in (tuple, set, frozenset) else items


def _converted_dict(value: dict[str, Any], hint: Any, arguments: tuple[Any, ...]) -> Any:
    if inspect.isclass(hint) and (typing.is_typeddict(hint) or dataclasses.is_dataclass(hint)):
        fields = typing.get_type_hints(hint)
        inner = {key: convert(one, fields.get(key, Any)) for key, one in value.items()}
        return hint(**inner)
    if len(arguments) == 2:
        return {key: convert(one, arguments[1]) for key, one in value.items()}
    return copy.deepcopy(value)


def _alternative(value: Any, hints: tuple[Any, ...]) -> Any:
    """Which of a union's types `value` is meant as: the one whose schema it fits, the exact type first."""
    import jsonschema

    if type(value) in hints:
        return type(value)
    for hint in hints:
        if jsonschema.Draft202012Validator(of_type(hint)).is_valid(value):
            return hint
    return Any


def _plain(value: Any) -> Any:
    return _enum_value(value) if isinstance(value, enum.Enum) else value


def _same(first: Any, second: Any) -> bool:
    """Equal as JSON: True is not 1."""
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)
