"""Figures, tables, texts and the HTML report of a run, each made from its records or its events alone."""

from agentlab.report.figures import (
    fitness_by_generation,
    gate_verdict,
    lineage,
    scores,
    tradeoff,
    training_curves,
)
from agentlab.report.html import write_report
from agentlab.report.progress import Progress
from agentlab.report.summary import summary
from agentlab.report.tables import candidates_table, error_table
from agentlab.report.tree import family_tree

__all__ = [
    "Progress",
    "candidates_table",
    "error_table",
    "family_tree",
    "fitness_by_generation",
    "gate_verdict",
    "lineage",
    "scores",
    "summary",
    "tradeoff",
    "training_curves",
    "write_report",
]
