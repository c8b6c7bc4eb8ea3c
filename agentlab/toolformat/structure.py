"""What an answer with calls may look like, as an xgrammar structural tag: engines decode under it.

vLLM takes the same dict, as JSON, in `StructuredOutputsParams(structural_tag=…)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agentlab.toolformat.grammar import object_grammar
from agentlab.toolformat.styles import TAGS, CallStyle, Tool

Choice = Literal["auto", "required", "none"]
_THOUGHT = r"(Thought: [^\n]*\n)?"


def structure(
    tools: Sequence[Tool], style: CallStyle = TAGS, choice: Choice = "auto", calls: Literal["one", "many"] = "one"
) -> dict[str, Any]:
    """The structural tag of an answer that may ("auto"), must ("required") or must not ("none") call one of `tools`.

    auto: free text in which a call, once begun, parses and fits its tool; with calls="one" the answer ends after it.
    required: exactly one call and nothing else (ReAct: one line of thought before it); "many": one or more.
    JSON is written as json.dumps writes it. Keywords that cannot be compiled are loosened: validate afterwards.
    Raises ValueError where there is no tool to call.
    """
    closing = [style.end] if style.end.startswith("<") else []  # alone in free text it is an attempt at a call
    if choice == "none":
        return _root({"type": "any_text", "excludes": [style.trigger, *closing]})
    if not tools:
        raise ValueError(f"choice {choice} without tools; allowed: none")
    tags = [_tag(tool, style) for tool in tools]
    if calls == "many" and style.is_list:
        tags = [_list_tag(tags, style)]
        calls = "one"
    if choice == "auto":
        return _root(
            {
                "type": "triggered_tags",
                "triggers": [style.trigger],
                "tags": tags,
                "at_least_one": False,
                "stop_after_first": calls == "one",
                "excludes": closing,
            }
        )
    body: dict[str, Any] = {"type": "or", "elements": tags}
    if calls == "many":
        body = {"type": "tags_with_separator", "tags": tags, "separator": "\n", "at_least_one": True}
    if style.kind == "react":
        body = {"type": "sequence", "elements": [{"type": "regex", "pattern": _THOUGHT}, body]}
    return _root(body)


def _root(body: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": dict(body)}


def _tag(tool: Tool, style: CallStyle) -> dict[str, Any]:
    return {
        "type": "tag",
        "begin": style.begin(tool["name"]),
        "content": {"type": "grammar", "grammar": object_grammar(tool.get("parameters") or {})},
        "end": style.finish,
    }


def _list_tag(tags: Sequence[Mapping[str, Any]], style: CallStyle) -> dict[str, Any]:
    """Several calls as the items of one array: the brackets move from the calls to the whole."""
    items = [
        {**tag, "begin": tag["begin"].removeprefix(style.open), "end": tag["end"].removesuffix(style.close)}
        for tag in tags
    ]
    content = {"type": "tags_with_separator", "tags": items, "separator": ", ", "at_least_one": True}
    return {"type": "tag", "begin": style.open, "content": content, "end": style.close}
