"""The memory: rows in SQLite, a view of them in RAM, recall by meaning and by words, conversations, forgetting."""

from agentlab.memory.memory import Memory
from agentlab.memory.ranking import Weights
from agentlab.memory.records import ConversationItem, Hit, KnowledgeItem, MemoryItem, SessionContext, Tombstone

__all__ = ["ConversationItem", "Hit", "KnowledgeItem", "Memory", "MemoryItem", "SessionContext", "Tombstone", "Weights"]
