"""Engines: one loaded base model that answers batches of chats, each request with its own adapter."""

from typing import TYPE_CHECKING

from agentlab.config import Settings
from agentlab.inference.contract import Chunk, Completion, Engine, EngineError, OutOfMemoryError, Request
from agentlab.models import ModelFiles

if TYPE_CHECKING:
    from agentlab.inference.transformers_engine import TransformersEngine

__all__ = ["Chunk", "Completion", "Engine", "EngineError", "OutOfMemoryError", "Request", "open_engine"]


def open_engine(settings: Settings, model: ModelFiles) -> "TransformersEngine":
    """Load the engine that the settings ask for; `auto` is the transformers engine, which is always installed."""
    from agentlab.inference.transformers_engine import TransformersEngine

    return TransformersEngine(model, settings.budget.vram_gib)
