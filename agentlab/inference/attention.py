"""Attention on a CPU for models whose query heads share key and value heads (GQA), without copying the cache."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_shared_heads"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, the same sums: query (B, H, L, D), key and value (B, H / groups, T, D).

    transformers repeats keys and values for every query head, at each decoded token the whole cache. Here the queries
    that share a key head are laid out as further positions of that head, so that nothing is copied.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    batch, heads, length, size = query.shape
    masked_alike = (attention_mask is None and length == 1) or (
        attention_mask is not None and attention_mask.shape[1] == 1
    )
    if groups == 1 or not masked_alike or kwargs.get("position_bias") is not None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    shared = query.reshape(batch, heads // groups, groups * length, size)
    mask = None
    if attention_mask is not None:  # (B, 1, L, T)
        mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(
        shared, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return output.reshape(batch, heads, length, size).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers; the name to load a model with."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
