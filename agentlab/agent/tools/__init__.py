"""Tools: plain typed functions with a schema, run on time and out of harm's way; the built-in ones."""

from agentlab.agent.tools.definition import Tool, from_definition, tool
from agentlab.agent.tools.execution import Observation, execute
from agentlab.agent.tools.untrusted import as_untrusted

__all__ = ["Observation", "Tool", "as_untrusted", "execute", "from_definition", "tool"]
