"""Tools with every kind of parameter that a structured answer has to fill in."""

STRING, INTEGER, NUMBER, BOOLEAN = ({"type": kind} for kind in ("string", "integer", "number", "boolean"))


POINT = {"type": "object", "properties": {"lat": NUMBER}, "required": ["lat"]}


def _tool(name, required, **properties):
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": name, "description": "", "parameters": parameters}


TOOLS = [
    {"name": "now"},
    _tool("weather.get", ["city"], city=STRING, days={**INTEGER, "default": 1}),
    _tool('say "hello"', ["text"], text=STRING, loud=BOOLEAN),
    _tool("天気", ["都市", "ø"], 都市=STRING, ø={"enum": ["日本", "Z\"'ü", "a/b"]}, 数=NUMBER),
    _tool("numbers", ["i", "n"], i=INTEGER, n=NUMBER, small={"type": "integer", "minimum": 3, "maximum": 120}),
    _tool("mixed", ["x", "y"], x={"anyOf": [INTEGER, STRING, {"type": "null"}]}, y={"type": ["string", "null"]}),
    _tool("lists", ["a", "b"], a={"type": "array", "items": STRING}, b={"type": "array", "items": INTEGER}),
    _tool("pairs", ["p"], p={"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 4}),
    _tool(
        "nested",
        ["place", "when"],
        place={
            "type": "object",
            "properties": {"name": STRING, "at": POINT},
            "required": ["name", "at"],
        },
        when={"type": "array", "items": {"type": "object", "properties": {"h": INTEGER}, "required": ["h"]}},
        note=STRING,
    ),
    _tool("values", ["e", "c"], e={"enum": [1, 2.5, None, True, "one"]}, c={"const": "fixed"}, o={"enum": ["C", "F"]}),
    _tool("lengths", ["s"], s={**STRING, "minLength": 3, "maxLength": 9}, t={**STRING, "pattern": "^[A-Z]{2}$"}),
    _tool("formats", ["day", "s"], day={**STRING, "format": "date"}, s={**STRING, "format": "email"}),
    _tool("above", ["n", "i"], n={"type": "number", "minimum": 0.5}, i={"type": "integer", "exclusiveMinimum": -7}),
    _tool("many", list("abcdefgh"), **dict.fromkeys("abcdefgh", STRING), i=STRING, j=INTEGER),
    _tool("fraction", ["share"], share={"type": "number", "minimum": 0, "maximum": 1}),
    _tool("anything", ["list"], list={"type": "array"}, day={"oneOf": [{"enum": ["today"]}, INTEGER]}),
]

# What xgrammar cannot compile, or would read wrongly: loosened, and still a call of the right shape.
LOOSE_TOOLS = [
    _tool("ref", ["a"], a={"$ref": "#/nowhere"}),
    _tool("regex", ["a"], a={"type": "string", "pattern": "["}),
    _tool("lengths", ["a"], a={"type": "string", "minLength": 5, "maxLength": 2}),
    _tool("range", ["a"], a={"type": "integer", "minimum": 5, "maximum": 2}),
    _tool("nothing", ["a"], a={"enum": []}),
    _tool("negation", ["a"], a={"type": "string", "not": {"const": "x"}}, b={"if": {}, "then": {}}),
    _tool("unique", ["a"], a={"type": "array", "uniqueItems": True}),
    _tool("all", ["a"], a={"allOf": [{"type": "string"}, {"minLength": 3}]}),
]
