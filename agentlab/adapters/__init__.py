"""Adapters: LoRA weights on disk and in memory, their cards, merging, and the pool of one run."""

from agentlab.adapters.card import Card
from agentlab.adapters.export import merge_into_base
from agentlab.adapters.lora import Lora, delta, load, save
from agentlab.adapters.merge import add_noise, crossover, resize_rank
from agentlab.adapters.pool import Pool

__all__ = ["Card", "Lora", "Pool", "add_noise", "crossover", "delta", "load", "merge_into_base", "resize_rank", "save"]
