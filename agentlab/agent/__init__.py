"""The agent: a loop that answers with tools and a memory, and what keeps untrusted text and code from doing harm."""

from agentlab.agent.agent import Agent
from agentlab.agent.loop import Options
from agentlab.agent.steps import ModelInfo, ReasoningResult, ReasoningStep, Step
from agentlab.agent.tools import Observation, Tool, as_untrusted, execute, from_definition, tool

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
