"""A chat completion request → what the agent is asked. What cannot be honoured is refused, never ignored."""

import dataclasses
from typing import Annotated, Any

import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from agentlab.serve.problems import Problem

MODEL = "agentlab"
"""The stable name under which the champion is asked."""

# Fields of OpenAI's interface that the agent has no counterpart for: the values that mean "as if it were absent", and
# why another one is refused.
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer is given to a request"),
    "tools": (([],), "the agent calls its own tools, on the server"),
    "functions": (([],), "the agent calls its own tools, on the server"),
    "function_call": (("auto", "none"), "the agent calls its own tools, on the server"),
    "parallel_tool_calls": ((False,), "the agent calls one tool at a time"),
    "response_format": (({"type": "text"},), "answers are text"),
    "modalities": ((["text"],), "answers are text"),
    "logprobs": ((False,), "the confidence is in the field agentlab of the answer"),
    "top_logprobs": ((0,), "the confidence is in the field agentlab of the answer"),
    "logit_bias": (({},), "tokens cannot be weighted"),
    "top_p": ((1,), "sampling is set by temperature and seed"),
    "presence_penalty": ((0,), "sampling is set by temperature and seed"),
    "frequency_penalty": ((0,), "sampling is set by temperature and seed"),
    "store": ((False,), "nothing is kept but the turns of a session_id"),
    "metadata": (({},), "nothing is kept but the turns of a session_id"),
    "service_tier": (("auto", "default"), "there is one queue for all"),
}


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request. options: the fields of the agent's `Options` that it sets."""

    model: str
    task: str
    history: tuple[dict[str, str], ...]
    options: dict[str, Any]
    session_id: str | None
    deadline_s: float | None
    stream: bool
    include_usage: bool


_Text = Annotated[str, Field(min_length=1)]


def _listed(value: Any) -> Any:
    """A text alone as a list of it: so an error is one of the list, and names its limit."""
    return [value] if isinstance(value, str) else value


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[_Text], Field(max_length=4), BeforeValidator(_listed)] | None = None
    tool_choice: str | None = None
    user: str | None = None  # who asks, and what is alike: nothing depends on them
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    deadline_s: Annotated[float, Field(gt=0, lt=1e6)] | None = None


def parse(body: bytes) -> Ask:
    """What a request's JSON asks for. Raises Problem (400) with one sentence that names the field."""
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body is not a JSON object", code="invalid_json")
    request = _checked(_without_neutral(value))
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise Problem(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    system, task, history = _talk(request.messages)
    options: dict[str, Any] = {
        "system": system,
        "max_new_tokens": next(iter(limits), None),
        "temperature": request.temperature,
        "seed": request.seed,
        "stop": tuple(request.stop or ()),
        "tool_choice": _tool_choice(request.tool_choice),
    }
    return Ask(
        model=request.model or MODEL,
        task=task,
        history=tuple(history),
        options={name: option for name, option in options.items() if option is not None},
        session_id=request.session_id,
        deadline_s=request.deadline_s,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _without_neutral(value: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, given in value.items():
        if given is None:
            continue
        if name not in _NEUTRAL:
            kept[name] = given
            continue
        allowed, why = _NEUTRAL[name]
        if not any(given == one and isinstance(given, bool) == isinstance(one, bool) for one in allowed):
            shown = ", ".join(map(str, allowed))
            raise Problem(400, f"{name} is not supported: {why}; allowed: {shown}", param=name, code="unsupported")
    return kept


def _checked(value: dict[str, Any]) -> _Request:
    try:
        return _Request.model_validate(value)
    except pydantic.ValidationError as error:
        found = error.errors(include_input=False, include_url=False)[0]
        param = str(found["loc"][0]) if found["loc"] else None
        if found["type"] == "extra_forbidden":
            names = ", ".join(sorted({*_Request.model_fields, *_NEUTRAL}))
            message = f"unknown field {'.'.join(map(str, found['loc']))!s:.80}; allowed: {names}"
            raise Problem(400, message, param=param and param[:80], code="unknown_field") from None
        raise Problem(400, f"{param}: {found['msg']}", param=param, code="invalid_value") from None


def _tool_choice(value: str | None) -> str | None:
    if value not in (None, "auto", "none", "required"):
        raise Problem(
            400, f"tool_choice: {value!r:.80}; allowed: auto, none, required (of the agent's own tools)",
            param="tool_choice", code="unsupported",
        )  # fmt: skip
    return value


def _talk(messages: list[dict[str, Any]]) -> tuple[str, str, list[dict[str, str]]]:
    """The system prompt, the task and the talk before it. User messages that end the talk in a row are one task."""
    said = [_message(at, message) for at, message in enumerate(messages)]
    leading = next((at for at, (role, _) in enumerate(said) if role != "system"), len(said))
    for at, (role, _) in enumerate(said[leading:], start=leading):
        if role == "system":
            raise _wrong(at, "a system message in the middle of the talk; allowed: at its beginning")
    system = "\n".join(text for _, text in said[:leading])
    last = len(said)
    while last > leading and said[last - 1][0] == "user":
        last -= 1
    task = "\n".join(text for _, text in said[last:])
    if not task.strip():
        raise _wrong(len(said) - 1, "the last message is no text of role user; that is the task")
    return system, task, [{"role": role, "content": text} for role, text in said[leading:last]]


def _message(at: int, message: dict[str, Any]) -> tuple[str, str]:
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise _wrong(at, "tool calls of the client are not supported: the agent calls its own tools, on the server")
    if role not in ("system", "developer", "user", "assistant"):
        raise _wrong(at, f"role {role!r:.40}; allowed: system, developer, user, assistant")
    # assistants' messages come back as they were sent: with fields that say nothing here
    known = {"role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call"}
    for name, value in message.items():
        if value is not None and (name not in known or (name == "audio")):
            raise _wrong(at, f"field {name!s:.40} is not supported; allowed: role, content, name")
    content = message.get("content")
    text = content if isinstance(content, str) else _parts(at, content)
    return ("system" if role == "developer" else str(role)), text


def _parts(at: int, content: Any) -> str:
    if not isinstance(content, list):
        raise _wrong(at, "content is missing; allowed: text, or a list of parts of type text")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _wrong(at, f"a part of type {kind!r:.40} is not supported; allowed: text")
        texts.append(part["text"])
    return "\n".join(texts)


def _wrong(at: int, message: str) -> Problem:
    return Problem(400, f"messages[{at}]: {message}", param=f"messages[{at}]", code="invalid_message")
