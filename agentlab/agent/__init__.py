"""The agent: a loop that answers with tools and a memory, and what keeps untrusted text and code from doing harm."""

from agentlab.agent.agent import Agent
from agentlab.agent.execution import Observation, execute
from agentlab.agent.loop import Options
from agentlab.agent.steps import ModelInfo, ReasoningResult, ReasoningStep, Step
from agentlab.agent.tools import Tool, from_definition, tool
from agentlab.agent.untrusted import as_untrusted

__all__ = [
    "Agent",
    "ModelInfo",
    "Observation",
    "Options",
    "ReasoningResult",
    "ReasoningStep",
    "Step",
    "Tool",
    "as_untrusted",
    "execute",
    "from_definition",
    "tool",
]
