"""Functions become tools: schema, descriptions, conversion, and the functions that are refused."""

import dataclasses
import enum
import functools
from typing import Annotated, Any, Literal, Optional, TypedDict

import pytest

from agentlab.agent import Tool, execute, from_definition, tool
from agentlab.errors import ToolError
from agentlab.toolformat import Call, check_tool, signature, validate


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(TypedDict, total=False):
    city: str
    zip_code: int


@dataclasses.dataclass
class Point:
    x: float
    y: float = 0.0


def checked(function, **options) -> Tool:
    made = tool(function, **options)
    assert check_tool(made.definition) is None
    return made


def test_a_plain_function_is_a_tool():
    def get_weather(city: str, days: int = 1) -> str:
        """Weather forecast
        for a city.

        More that the model need not read.
        """
        return f"{city} {days}"

    made = checked(get_weather)
    assert made.definition == {
        "name": "get_weather",
        "description": "Weather forecast for a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
            "required": ["city"],
        },
    }
    assert signature(made.definition) == "get_weather(city: str, days: int = 1) - Weather forecast for a city."
    assert made("Kyoto", days=2) == "Kyoto 2"


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list, {"type": "array"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (set[str], {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        (tuple[float, ...], {"type": "array", "items": {"type": "number"}}),
        (dict, {"type": "object"}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal[1, "b"], {"enum": [1, "b"]}),
        (Unit, {"type": "string", "enum": ["celsius", "kelvin"]}),
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
        (Any, {}),
    ],
)
def test_type_hints_become_schemas(hint, schema):
    def function(value):
        """Text."""

    function.__annotations__["value"] = hint
    assert checked(function).parameters["properties"]["value"] == schema


def test_records_become_objects():
    def function(place: Place, point: Point):
        """Text."""

    properties = checked(function).parameters["properties"]
    assert properties["place"]["properties"] == {"city": {"type": "string"}, "zip_code": {"type": "integer"}}
    assert "required" not in properties["place"]
    assert properties["point"]["required"] == ["x"]


GOOGLE = """Text.

Args:
    city: Where to look,
        in English.
    days (int, optional): How many days.

Returns:
    city: not a parameter
"""
NUMPY = """Text.

Parameters
----------
city : str
    Where to look,
    in English.
days : int, optional
    How many days.

Returns
-------
str
    Nothing.
"""
REST = """Text.

:param city: Where to look,
    in English.
:param int days: How many days.
:returns: nothing
"""


@pytest.mark.parametrize("docstring", [GOOGLE, NUMPY, REST])
def test_parameter_descriptions_are_read_from_the_docstring(docstring):
    def function(city: str, days: int = 1):
        pass

    function.__doc__ = docstring
    made = checked(function)
    assert made.description == "Text."
    properties = made.parameters["properties"]
    assert properties["city"]["description"] == "Where to look, in English."
    assert properties["days"]["description"] == "How many days."


def test_an_annotation_comes_before_the_docstring():
    def function(city: Annotated[str, "from the hint"]):
        """Text.

        :param city: from the docstring
        """

    assert checked(function).parameters["properties"]["city"]["description"] == "from the hint"


def test_decorator_with_and_without_options():
    @tool
    def one(x: int) -> int:
        """One."""
        return x

    @tool(timeout_s=3, name="zwei")
    def two(x: int) -> int:
        """Two."""
        return x

    assert (one.name, one.timeout_s) == ("one", 10)
    assert (two.name, two.timeout_s) == ("zwei", 3)


def test_methods_are_tools_without_self():
    class Shop:
        def price(self, name: str) -> float:
            """Price."""
            return 3.0

    assert list(checked(Shop().price).parameters["properties"]) == ["name"]


def test_defaults_that_json_cannot_say_are_only_optional():
    def function(unit: Unit = Unit.KELVIN, point: Point = Point(1, 2), n: int = None, nan: float = float("nan")):  # noqa: B008, RUF013
        """Text."""

    parameters = checked(function).parameters
    assert "required" not in parameters
    assert parameters["properties"]["unit"]["default"] == "kelvin"
    assert all("default" not in parameters["properties"][name] for name in ("point", "n", "nan"))


class Foreign:
    pass


@dataclasses.dataclass
class Scaled:
    value: int
    scale: dataclasses.InitVar[int]
    unit: dataclasses.InitVar[str] = "m"


@dataclasses.dataclass(init=False)
class OwnInit:
    value: int

    def __init__(self): ...


def refused():
    def args(*values: int): ...
    def kwargs(**values: int): ...
    def bare(x): ...
    def foreign(x: Foreign): ...
    def init_var(x: list[Scaled]): ...
    def own_init(x: OwnInit): ...
    def keys(x: dict[int, str]): ...
    def unknown(x: "Nowhere"): ...  # noqa: F821
    def positional(x: int, /): ...
    def größe(x: int): ...  # noqa: PLC2401

    def yielding(x: int):
        yield x

    def plain(x: int): ...

    return [
        (args, {}, r"args: \*values has no schema"),
        (kwargs, {}, r"kwargs: \*values has no schema"),
        (bare, {}, "bare: parameter x has no type hint"),
        (foreign, {}, "foreign: parameter x: Foreign is not a type that JSON can carry"),
        (init_var, {}, r"x: Scaled \(made of its fields: missing a required argument: 'scale'\) is not a type that"),
        (own_init, {}, r"x: OwnInit \(made of its fields: got an unexpected keyword argument 'value'\) is not a type"),
        (keys, {}, r"parameter x: dict\[int, str\]"),
        (unknown, {}, "Nowhere"),
        (positional, {}, "cannot be given by name"),
        (größe, {}, "tool name 'größe'"),
        (yielding, {}, "yielding yields"),
        (lambda x: x, {}, "a lambda"),
        (plain, {"name": "two words"}, "tool name 'two words'"),
        (plain, {"timeout_s": 0}, "timeout_s: 0"),
        (plain, {"timeout_s": "5"}, "timeout_s: '5'"),
        (plain, {"timeout_s": None}, "timeout_s: None"),
        (plain, {"timeout_s": float("nan")}, "timeout_s: nan"),
        (plain, {"max_output_chars": "many"}, "max_output_chars: 'many'"),
        (plain, {"name": 5}, "tool name 5"),
        (plain, {"description": 5}, "description: 5"),
        (5, {}, "5 is not a function"),
        (plain, {"max_output_chars": 1}, "max_output_chars: 1"),
        (functools.partial(plain, 1), {}, "not a function with a name"),
        (print, {}, "print: "),
    ]


@pytest.mark.parametrize(("function", "options", "message"), refused())
def test_bad_functions_are_refused_in_one_sentence(function, options, message):
    with pytest.raises(ToolError, match=message) as caught:
        tool(function, **options)
    assert "\n" not in str(caught.value)


def test_arguments_arrive_as_the_hints_promise():
    seen = {}

    @tool
    def function(
        n: int, f: float, unit: Unit, places: list[Place], point: Point, pair: tuple[int, float], names: set[str],
        maybe: Unit | None, either: int | str, choice: Literal[1, True], counts: dict[str, int], limit: int = 3,
    ) -> None:  # fmt: skip
        """Text."""
        seen.update(locals())

    arguments = {
        "n": 5.0, "f": 2, "unit": "kelvin", "places": [{"city": "Kyoto"}], "point": {"x": 1}, "pair": [1.0, 2],
        "names": ["a"], "maybe": "celsius", "either": 4.0, "choice": True, "counts": {"a": 1.0},
    }  # fmt: skip
    assert validate(Call("function", arguments), function.definition) == []
    assert execute(function, arguments, timeout_s=5).ok
    assert seen == {
        "n": 5, "f": 2.0, "unit": Unit.KELVIN, "places": [{"city": "Kyoto"}], "point": Point(1.0, 0.0),
        "pair": (1, 2.0), "names": {"a"}, "maybe": Unit.CELSIUS, "either": 4, "choice": True, "counts": {"a": 1},
        "limit": 3, "seen": seen,
    }  # fmt: skip
    assert [type(seen[key]) for key in ("n", "f", "either", "choice")] == [int, float, int, bool]
    assert type(seen["counts"]["a"]) is int


def test_a_tool_cannot_change_the_arguments_on_record():
    @tool
    def function(values: list[dict]) -> None:
        """Text."""
        values[0]["x"] = 2
        values.clear()

    arguments = {"values": [{"x": 1}]}
    execute(function, arguments, timeout_s=5)
    assert arguments == {"values": [{"x": 1}]}


def test_a_ready_made_definition_is_a_tool():
    definition = {
        "name": "math.gcd",
        "description": "Greatest common divisor",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
    made = from_definition(definition, lambda a: a + 1)
    assert made.definition == definition
    assert execute(made, {"a": 1}, timeout_s=5).text == "2"
    with pytest.raises(ToolError, match="unknown key extra"):
        from_definition({**definition, "extra": 1}, print)


def test_what_a_worker_process_cannot_get_is_refused_at_once():
    import threading

    lock = threading.Lock()

    def locked(x: int) -> int:
        """Text."""
        with lock:
            return x

    with pytest.raises(ToolError, match="cannot be sent to a worker process"):
        tool(locked, isolated=True)


@dataclasses.dataclass
class Branch:
    value: int
    inner: "Branch | None" = None


def test_a_type_that_holds_itself_has_no_schema():
    def climb(branch: Branch) -> int:
        """Climb."""
        return branch.value

    with pytest.raises(ToolError, match="climb: parameter branch: its type holds itself, which has no end"):
        tool(climb)
