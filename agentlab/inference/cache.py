"""A key-value cache that grows in place: transformers' own copies all of it for every token."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

_ROOM = 64  # tokens of room that are allocated at once


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A DynamicLayer whose `keys` and `values` (B, H, T, D) are the filled part of larger tensors."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._roomy_keys = self._roomy_values = torch.empty(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self._fits(key_states.shape[0], end):
            self._roomy_keys, self._roomy_values = (
                torch.empty(*states.shape[:-2], end + _ROOM, states.shape[-1], dtype=states.dtype, device=states.device)
                for states in (key_states, value_states)
            )
            if filled:
                self._roomy_keys[..., :filled, :] = self.keys
                self._roomy_values[..., :filled, :] = self.values
        self._roomy_keys[..., filled:end, :] = key_states
        self._roomy_values[..., filled:end, :] = value_states
        self.keys, self.values = self._roomy_keys[..., :end, :], self._roomy_values[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._roomy_keys, self._roomy_values = self.keys, self.values  # the memory of rows that are gone is free now

    def cut(self, tokens: int) -> None:
        """Keep the first tokens; the room of the others stays, for what comes next."""
        self.keys, self.values = self.keys[..., :tokens, :], self.values[..., :tokens, :]

    @property
    def room(self) -> int:
        """Tokens that memory is held for."""
        return int(self._roomy_keys.shape[-2]) if self._roomy_keys.dim() == 4 else 0

    def _fits(self, rows: int, end: int) -> bool:
        """Whether `keys` still lie in the larger tensors, with room left; repeated or selected rows are new tensors."""
        if self.keys.numel() and self.keys.data_ptr() != self._roomy_keys.data_ptr():
            return False
        shape = tuple(self._roomy_keys.shape)
        return len(shape) == 4 and shape[0] == rows and end <= shape[-2]


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether any beginning of it is a cache, too; a sliding window has let go of its own."""
    return all(type(layer) is _RoomyLayer for layer in cache.layers)


def cut(cache: DynamicCache, tokens: int) -> None:
    """Keep the first tokens of a cache that `can_be_cut`."""
    for layer in cache.layers:
        layer.cut(tokens)


def room_of(cache: DynamicCache) -> int:
    """Tokens that a cache that `can_be_cut` holds memory for."""
    return max((layer.room for layer in cache.layers), default=0)


def rows_can_share(cache: DynamicCache) -> bool:
    """Whether rows may begin with a copy of one row's cache and padding follow: not where a state runs through it."""
    return not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


def beginning_of(cache: DynamicCache, tokens: int) -> DynamicCache:
    """A copy of the first tokens of a cache that `can_be_cut`."""
    beginning = DynamicCache()
    beginning.layers = []
    for layer in cache.layers:
        copy = _RoomyLayer()
        copy.update(layer.keys[..., :tokens, :], layer.values[..., :tokens, :])
        beginning.layers.append(copy)
    return beginning


def growing_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this config; layers of other kinds (sliding windows) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
