"""Typed Python functions as tools: the schema comes from the signature and the docstring."""

import asyncio
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, overload

from agentlab import toolformat
from agentlab.agent.tools import docstrings, schema
from agentlab.errors import ToolError

TIMEOUT_S = 10.0
MAX_OUTPUT_CHARS = 2000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")


class Runner(Protocol):
    """Runs a tool's call itself instead of a thread or a worker process; the `python` tool brings one."""

    def __call__(
        self, arguments: Mapping[str, Any], *, timeout_s: float, should_stop: Callable[[], bool]
    ) -> tuple[str, str | None]:
        """(text, problem) within `timeout_s`; problem is None, "timeout", "error" or "cancelled"."""


@dataclass(frozen=True)
class Tool:
    """Something a model can call. `parameters` is a JSON schema of type object; `function` takes them by name."""

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any] = field(repr=False)
    timeout_s: float = TIMEOUT_S
    isolated: bool = False  # in a worker process that can be killed, instead of a thread that can only be left behind
    max_output_chars: int = MAX_OUTPUT_CHARS
    hints: Mapping[str, Any] = field(default_factory=dict, repr=False)  # type hints by parameter, for `convert`
    runner: Runner | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ToolError(
                f"tool name {self.name!r}; allowed: a letter, then up to 63 letters, digits, dots, - and _ (no lambda)"
            )
        if not callable(self.function):
            raise ToolError(f"tool {self.name}: {self.function!r} is not a function")
        if not isinstance(self.description, str):
            raise ToolError(f"tool {self.name}: description: {self.description!r:.80}; allowed: text")
        if not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise ToolError(f"tool {self.name}: timeout_s: {self.timeout_s!r}; allowed: a number above 0")
        if not isinstance(self.max_output_chars, int) or self.max_output_chars < 100:
            raise ToolError(f"tool {self.name}: max_output_chars: {self.max_output_chars!r}; allowed: from 100")
        if problem := toolformat.check_tool(self.definition):
            raise ToolError(problem)

    @property
    def definition(self) -> dict[str, Any]:
        """The tool as `toolformat` and chat templates take it: name, description, parameters."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}

    def convert(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Validated JSON arguments as the function's type hints promise them, in new containers."""
        return converted(arguments, self.hints)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The plain function, so that a decorated one still works in code."""
        return self.function(*args, **kwargs)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...
@overload
def tool(
    function: Callable[..., Any], /, *, name: str | None = ..., description: str | None = ..., timeout_s: float = ...,
    isolated: bool = ..., max_output_chars: int = ...,
) -> Tool: ...  # fmt: skip
@overload
def tool(
    *, name: str | None = ..., description: str | None = ..., timeout_s: float = ..., isolated: bool = ...,
    max_output_chars: int = ...,
) -> Callable[[Callable[..., Any]], Tool]: ...  # fmt: skip


def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, description: str | None = None,
    timeout_s: float = TIMEOUT_S, isolated: bool = False, max_output_chars: int = MAX_OUTPUT_CHARS,
) -> Tool | Callable[[Callable[..., Any]], Tool]:  # fmt: skip
    """The tool that `function` is; as `@tool` or `@tool(timeout_s=3)` also a decorator.

    Type hints give the schema, the docstring's first paragraph the description, its parameter section (Google, NumPy
    or reST) or Annotated[T, "text"] those of the parameters. Raises ToolError for *args, **kwargs, a missing or
    unsupported type hint, a lambda, a generator, an illegal name.
    """

    def make(wrapped: Callable[..., Any]) -> Tool:
        called = name or getattr(wrapped, "__name__", None)
        if called is None or not callable(wrapped):
            raise ToolError(f"{wrapped!r} is not a function with a name; allowed: def functions and methods")
        if called == "<lambda>":
            raise ToolError("a lambda has no name, no type hints and no docstring; allowed: a def function")
        if inspect.isgeneratorfunction(wrapped) or inspect.isasyncgenfunction(wrapped):
            raise ToolError(f"{called} yields; allowed: a function that returns its result")
        text = inspect.getdoc(wrapped)
        parameters, hints = schema.of_function(wrapped, docstrings.parameter_descriptions(text))
        made = Tool(
            name=called,
            description=docstrings.description(text) if description is None else description,
            parameters=parameters,
            function=wrapped,
            timeout_s=timeout_s,
            isolated=isolated,
            max_output_chars=max_output_chars,
            hints=hints,
        )
        if isolated:
            from agentlab.agent.tools.worker import check_sendable

            check_sendable(made)
        return made

    return make if function is None else make(function)


def from_definition(
    definition: Mapping[str, Any], function: Callable[..., Any], *, timeout_s: float = TIMEOUT_S,
    isolated: bool = False, max_output_chars: int = MAX_OUTPUT_CHARS,
) -> Tool:  # fmt: skip
    """The tool of a ready-made definition; `function` takes the arguments by name, as JSON gives them."""
    if problem := toolformat.check_tool(dict(definition)):
        raise ToolError(problem)
    return Tool(
        name=definition["name"],
        description=str(definition.get("description", "")),
        parameters=dict(definition.get("parameters") or {"type": "object", "properties": {}}),
        function=function,
        timeout_s=timeout_s,
        isolated=isolated,
        max_output_chars=max_output_chars,
    )


def converted(arguments: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Validated JSON arguments as these type hints promise them. It runs what their classes do when they are made."""
    return {name: schema.convert(value, hints.get(name, Any)) for name, value in arguments.items()}


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What the function returns; an async function is run to its end in an event loop of its own."""
    result = function(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result
