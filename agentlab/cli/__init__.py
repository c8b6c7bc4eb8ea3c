"""The command line: `agentlab COMMAND`. Heavy libraries are imported inside the commands that need them."""

from agentlab.cli.main import main

__all__ = ["main"]
