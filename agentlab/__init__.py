"""agentlab: a workbench where a small local language model becomes a better agent, one generation at a time."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentlab.lab import Lab

__all__ = ["Lab"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Lab` when it is asked for, so that `import agentlab` stays cheap."""
    if name == "Lab":
        from agentlab.lab import Lab

        return Lab
    raise AttributeError(f"module 'agentlab' has no attribute {name!r}")
