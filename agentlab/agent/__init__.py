"""The agent: tools, their execution, and what keeps untrusted text and code from doing harm."""

from agentlab.agent.execution import Observation, execute
from agentlab.agent.tools import Tool, from_definition, tool
from agentlab.agent.untrusted import as_untrusted

__all__ = ["Observation", "Tool", "as_untrusted", "execute", "from_definition", "tool"]
