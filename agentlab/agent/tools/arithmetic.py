"""An arithmetic expression as people write it → a number; nothing but numbers is ever evaluated."""

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from agentlab.errors import ToolError

Number = int | float
_MAX_CHARS = 1000
_MAX_BITS = 10_000  # some 3,000 digits
_MAX_FACTORIAL = 1000
_ALLOWED = "numbers, + - * / // % ** ( ), 15% of 80, pi, e and the functions "

_SYMBOLS = str.maketrans(
    {"×": "*", "·": "*", "⋅": "*", "∗": "*", "✕": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "＋": "+",
     "％": "%", "（": "(", "）": ")", "，": ",", "．": ".", "π": "pi", "\u00a0": " ", "\u202f": " ", "\u2009": " "}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {power: f"**{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)  # fmt: skip
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of `expression` in as few digits as say it; raises ToolError with one sentence on what is wrong."""
    try:
        return number(evaluate(expression))
    except ZeroDivisionError:
        raise ToolError("division by zero has no result") from None
    except OverflowError:
        raise ToolError("the result is too large") from None


def evaluate(expression: str) -> Number:
    """The value of `expression`; see `calculate`."""
    if len(expression) > _MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; allowed: up to {_MAX_CHARS}")
    text = _as_python(expression)
    if not text:
        raise ToolError("the expression is empty; allowed: something like 17 * (3 + 4)")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression.strip()[:200]!r} is not an expression; allowed: {_ALLOWED}{_names()}") from None


def number(value: Number) -> str:
    """`value` for people: 397.8 and not 397.80000000000007, 3 and not 3.0."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ToolError("the result is too large")
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.15g}".replace("e+", "e")


def _as_python(expression: str) -> str:
    """Signs, thousands, percentages and powers in Python's notation."""
    text = expression.translate(_SYMBOLS).strip().removesuffix("=").strip().lower()
    text = re.sub(r"\bper\s?cent\b", "%", text).replace("^", "**")
    text = _without_thousands(text)
    text = re.sub(r"√\s*([\d.]+)", r"sqrt(\1)", text).replace("√", "sqrt")
    text = re.sub(r"\b(\d+)\s*!(?!=)", r"factorial(\1)", text)
    return _percentages(text)


def _without_thousands(text: str) -> str:
    """Commas between groups of three digits go, but not inside a call: there they part the arguments."""
    result, depth, start = [], 0, 0
    for match in re.finditer(r"[a-z]\w*\s*\(|\(|\)|$", text):
        piece = text[start : match.start()]
        if depth and re.search(r", ", piece) and _THOUSANDS.search(piece):
            raise ToolError("commas part arguments here, so numbers must not hold any: write 1500, not 1,500")
        result.append(piece if depth else _THOUSANDS.sub(lambda found: found.group().replace(",", ""), piece))
        result.append(match.group())
        start = match.end()
        if match.group() == ")":
            depth = max(0, depth - 1)
        elif depth or len(match.group()) > 1:
            depth += match.group() != ""
    return "".join(result)


def _percentages(text: str) -> str:
    """`15% of 80` and `20%` as divisions by 100; `17 % 5` stays the remainder."""
    if re.search(r"[/%]\s*[\d.]+\s*%\s*of\b", text):
        raise ToolError("it is not clear what is divided; put parentheses around the percentage, as in 10 / (5% of 80)")
    if re.search(r"\d%\s*[+-]\S", text):
        raise ToolError("it is not clear whether % is a percentage or a remainder; write 10 / 100 - 3 or 10 % (-3)")
    text = re.sub(r"%\s*of\b", "/100*", text)
    if re.search(r"[+-]\s*[\d.]+\s*%\s*(?:$|[)+*/-])", text) and not re.match(r"\s*[+-]?\s*[\d.]+\s*%", text):
        raise ToolError("adding or taking off a percentage needs to say of what, as in 200 + 10% of 200")
    return re.sub(r"%(?=\s*(?:$|[)*/,]|[+-]\s))", "/100", text)


def _names() -> str:
    return ", ".join(sorted(_FUNCTIONS))


def _value(node: ast.AST) -> Number:  # noqa: PLR0911 - one case per kind of expression
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Name(id="pi" | "e" as name):
            return math.pi if name == "pi" else math.e
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _called(name, arguments)
        case ast.Call():
            raise ToolError("a number stands before a parenthesis; write 2 * (3 + 4), not 2 (3 + 4)")
        case ast.Name(id=name):
            raise ToolError(f"unknown name {name}; allowed: {_ALLOWED}{_names()}")
        case ast.Tuple():
            raise ToolError("a comma is not between groups of three digits; write 1234.5 or 1,234.5")
    raise ToolError(f"only numbers can be calculated; allowed: {_ALLOWED}{_names()}")


def _called(name: str, nodes: list[ast.expr]) -> Number:
    if name not in _FUNCTIONS:
        raise ToolError(f"unknown function {name}; allowed: {_names()}")
    function, least, most = _FUNCTIONS[name]
    if most is None and len(nodes) == 1 and isinstance(nodes[0], ast.List | ast.Tuple):
        nodes = nodes[0].elts
    values = [_value(node) for node in nodes]
    if not least <= len(values) <= (len(values) if most is None else most):
        count = f"at least {least}" if most is None else str(least) if least == most else f"{least} or {most}"
        raise ToolError(f"{name} takes {count} number{'s' if count != '1' else ''}, not {len(values)}")
    try:
        result = function(*values)
    except (ValueError, TypeError):
        shown = ", ".join(number(value) for value in values)
        raise ToolError(f"{name}({shown}) has no real result") from None
    return _bounded(result)


def _power(base: Number, exponent: Number) -> Number:
    whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
    # checked before it is calculated: 9**9**9 would take hours
    if whole and int(base).bit_length() * exponent > _MAX_BITS:
        raise ToolError("the result is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise ToolError(f"{number(base)} to the power of {number(exponent)} has no real result")
    return _bounded(result)


def _factorial(value: Number) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    if value > _MAX_FACTORIAL:
        raise ToolError(f"factorial of {number(value)} is too large; allowed: up to {_MAX_FACTORIAL}")
    return math.factorial(int(value))


def _round(value: Number, digits: Number = 0) -> Number:
    if not -20 <= digits <= 20 or digits != int(digits):
        raise ToolError(f"round to {number(digits)} digits; allowed: a whole number from -20 to 20")
    return round(value, int(digits))


def _sum(*values: Number) -> Number:
    return sum(values) if all(isinstance(value, int) for value in values) else math.fsum(values)


# name: (function, fewest arguments, most)
_FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int | None]] = {
    "abs": (abs, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "cos": (math.cos, 1, 1),
    "exp": (math.exp, 1, 1),
    "factorial": (_factorial, 1, 1),
    "floor": (math.floor, 1, 1),
    "ln": (math.log, 1, 1),
    "log": (math.log, 1, 2),
    "log10": (math.log10, 1, 1),
    "log2": (math.log2, 1, 1),
    "max": (max, 1, None),
    "min": (min, 1, None),
    "round": (_round, 1, 2),
    "sin": (math.sin, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "sum": (_sum, 1, None),
    "tan": (math.tan, 1, 1),
}


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise ToolError("the result is too large")
    elif not math.isfinite(value):
        raise ToolError("the result is too large")
    return value
