"""Suites of verifiable work: loading, checking, building them from other data."""

from agentlab.tasks.builtin import BUILT_IN
from agentlab.tasks.loaders import make_suite
from agentlab.tasks.suite import Item, Suite, load, score_split
from agentlab.tasks.writing import export_built_in

__all__ = ["BUILT_IN", "Item", "Suite", "export_built_in", "load", "make_suite", "score_split"]
