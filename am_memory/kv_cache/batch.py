"""Several caches that read a token each in one forward pass: row i of every tensor belongs to cache i.

Keys and values go to each cache's own layers. Recurrent states are stacked for the pass, and handed back after it.
Knows no model, and not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer, RecurrentState, SlidingLayer
from am_memory.kv_cache.recurrent import EmptyLayer, RecurrentLayer, WithRecurrentStates

LayerWithKeys = CompactableLayer | SlidingLayer


class BatchLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of attention of several caches.

    `update` returns the new keys with this layer in their attribute `am_layer`. The attention function finds in
    `entries` what each row attends to.

    Attributes:
        layers: of each cache.
        entries: of each cache, what the layer's own `update` returned in this pass.
    """

    is_sliding = False

    def __init__(self, layers: Sequence[LayerWithKeys]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.entries: list[tuple[Tensor, Tensor]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: each layer does it for itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append row i of (num_caches, num_key_value_heads, 1, head_dim) to layer i."""
        size = len(self.layers)
        rows = zip(self.layers, key_states.tensor_split(size), value_states.tensor_split(size), strict=True)
        self.entries = [layer.update(key, value) for layer, key, value in rows]
        key_states = key_states[:]
        key_states.am_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Logical length of the longest cache."""
        return max(layer.get_seq_length() for layer in self.layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens; the attention function makes earlier ones visible."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1


class BatchCache(WithRecurrentStates):
    """Stands in for several caches during one forward pass, in which each of them reads one token.

    Args:
        caches: of one engine, each with at least one token.
    """

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._states = {index: [cache.recurrent[index] for cache in caches] for index in caches[0].recurrent}
        self.recurrent = {index: _stacked(layers) for index, layers in self._states.items()}
        columns = enumerate(zip(*(cache.layers for cache in caches), strict=True))
        super().__init__(
            layers=[
                BatchLayer(each) if isinstance(each[0], LayerWithKeys) else self.recurrent.get(index, EmptyLayer())
                for index, each in columns
            ]
        )
        self.held_rope = caches[0].held_rope

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length of the longest cache."""
        return max(layer.get_seq_length() for layer in self.layers if isinstance(layer, BatchLayer))

    def hand_back(self) -> None:
        """Give each cache its rows of the recurrent states, after the pass."""
        for index, layers in self._states.items():
            stacked = self.recurrent[index].state()
            for row, layer in enumerate(layers):
                layer.restore(RecurrentState(*(_rows(states, row) for states in stacked)))


def _stacked(layers: Sequence[RecurrentLayer]) -> RecurrentLayer:
    """A layer whose states have a row for each of these layers."""
    states = [(tuple(layer.conv_states.values()), tuple(layer.recurrent_states.values())) for layer in layers]
    conv, recurrent = ([_stack(rows) for rows in zip(*sort, strict=True)] for sort in zip(*states, strict=True))
    stacked = RecurrentLayer(layers[0].number_of_states)
    stacked.restore(RecurrentState(tuple(conv), tuple(recurrent)))
    stacked.is_shared = False  # nothing else refers to the new tensors
    return stacked


def _stack(rows: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [row for row in rows if row is not None]
    return torch.cat(tensors) if tensors else None


def _rows(states: Sequence[Tensor | None], row: int) -> tuple[Tensor | None, ...]:
    """One row of each state, in memory of its own."""
    return tuple(None if state is None else state[row : row + 1].clone() for state in states)
