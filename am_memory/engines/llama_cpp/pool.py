"""A layer's slots and exact tail in one piece of memory, as llama.cpp's flash attention reads them. Knows no graph.

    [slots of head 0]...[slots of the last head][token 0, head 0][token 0, head 1]...      rows of head_dim numbers

The kernel reads as many keys for each head. Where a layer has slots, every head is given all rows, and a mask that
hides the rows of other heads; the biases of slots are added by this mask too. The kernel skips what is hidden, and
nothing is padded.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Rows, decoded
from am_memory.kv_cache.layers import CompactableLayer, TailBuffer
from am_memory.kv_cache.slots import Slots

SPARE_TOKENS = 64
"""The least room for further tokens in a new pool, which is a copy of the last one; longer tails get a 32nd part of
them."""


class Pool(TailBuffer):
    """The memory of one layer; `key` and `value` are the part of the tail.

    Args:
        layer: a layer that has a tail; its entries are copied.
        num_attention_heads: query heads.

    Attributes:
        slots: the layer's slots, whose keys and values are in the pool unless they are in int8.
        seen_key, seen_value: (num_heads, num_seen, head_dim), views of the rows that the kernel is given.
        mask: (num_attention_heads or 1, 1, num_seen) float16: biases of slots, 0 for exact entries, -inf for other
            heads' rows.
        num_slots: rows before the tail.
    """

    def __init__(self, layer: CompactableLayer, num_attention_heads: int) -> None:
        key, value = layer.tail
        _, num_heads, num_tokens, head_dim = key.shape
        capacity = num_tokens + max(SPARE_TOKENS, num_tokens // 32)
        self.num_slots = layer.slots.num_slots if layer.slots is not None else 0
        self._tail_shape = capacity, num_heads, head_dim
        self._key_rows = key.new_empty(self.num_slots + capacity * num_heads, head_dim)
        self._value_rows = torch.empty_like(self._key_rows, dtype=value.dtype)
        super().__init__(self._tail(self._key_rows), self._tail(self._value_rows))
        self.key[:, :, :num_tokens], self.value[:, :, :num_tokens] = key, value
        self.slots = self._taken_in(layer.slots)
        if self.num_slots:
            self.seen_key, self.seen_value = (
                rows.expand(num_heads, -1, -1) for rows in (self._key_rows, self._value_rows)
            )
            self.mask = self._mask(num_attention_heads)
        else:
            self.seen_key, self.seen_value = self.key[0], self.value[0]
            self.mask = torch.zeros(1, 1, capacity, dtype=torch.float16)

    def num_seen(self, num_tokens: int) -> int:
        """The number of rows that the kernel is given if the tail has so many tokens."""
        return self.num_slots + num_tokens * self._tail_shape[1] if self.num_slots else num_tokens

    def _tail(self, rows: Tensor) -> Tensor:
        """The rows of the tail, (1, num_heads, capacity, head_dim)."""
        return rows[self.num_slots :].view(self._tail_shape).transpose(0, 1)[None]

    def _taken_in(self, slots: Slots | None) -> Slots | None:
        """Copy slots into the pool; returns them as views of it."""
        if slots is None:
            return None
        key, value = self._key_rows[: self.num_slots], self._value_rows[: self.num_slots]
        key.copy_(decoded(slots.key))
        value.copy_(decoded(slots.value))
        return replace(slots, key=_in(key, slots.key), value=_in(value, slots.value))

    def _mask(self, num_attention_heads: int) -> Tensor:
        capacity, num_heads, _ = self._tail_shape
        mask = torch.full((num_heads, len(self._key_rows)), -torch.inf, dtype=torch.float16)
        if self.slots is not None:
            for head, (start, end) in enumerate(pairwise(self.slots.cu_slots)):
                mask[head, start:end] = self.slots.bias[start:end]
        mask[:, self.num_slots :].view(num_heads, capacity, num_heads).diagonal(dim1=0, dim2=2).zero_()
        return mask.repeat_interleave(num_attention_heads // num_heads, dim=0)[:, None]


def _in(pool: Tensor, rows: Rows) -> Rows:
    """The rows as a view of the pool; int8 rows stay what they are."""
    return pool if isinstance(rows, Tensor) else rows


def pooled(layer: CompactableLayer, num_attention_heads: int) -> Pool:
    """The pool of a layer, with room for another token; if it has none, its content is moved into a new one."""
    pool = layer.buffer
    if not isinstance(pool, Pool) or pool.slots is not layer.slots or not layer.room:
        pool = layer.buffer = Pool(layer, num_attention_heads)
        layer.slots = pool.slots
    return pool
