"""Engines: one loaded base model that answers batches of chats, each request with its own adapter."""

from agentlab.inference.contract import Capabilities, Chunk, Completion, Engine, EngineError, OutOfMemoryError, Request
from agentlab.inference.opening import choose_engine, open_engine

__all__ = [
    "Capabilities",
    "Chunk",
    "Completion",
    "Engine",
    "EngineError",
    "OutOfMemoryError",
    "Request",
    "choose_engine",
    "open_engine",
]
