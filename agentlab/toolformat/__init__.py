"""How tools are shown to a model and how its calls are written, read, checked, repaired and enforced.

A tool is a dict {"name", "description", "parameters"}, the last a JSON schema object. It is shown as one line,
`get_weather(city: str, days: int = 1) - Weather forecast`. A call is
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, or whatever the model's own chat template writes.
"""

from agentlab.toolformat.calls import CLOSE, OPEN, Call, decode_json, parse_calls, parse_thought, render_call
from agentlab.toolformat.detection import shows_tools, style_of_template, template_tools
from agentlab.toolformat.repair import repair
from agentlab.toolformat.showing import NO_TOOL, signature, system_prompt
from agentlab.toolformat.structure import structure
from agentlab.toolformat.styles import REACT, TAGS, CallStyle, Tool
from agentlab.toolformat.validation import check_tool, validate

__all__ = [
    "CLOSE",
    "NO_TOOL",
    "OPEN",
    "REACT",
    "TAGS",
    "Call",
    "CallStyle",
    "Tool",
    "check_tool",
    "decode_json",
    "parse_calls",
    "parse_thought",
    "render_call",
    "repair",
    "shows_tools",
    "signature",
    "structure",
    "style_of_template",
    "system_prompt",
    "template_tools",
    "validate",
]
