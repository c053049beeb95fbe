"""A layer's slots and exact tail in one piece of memory, as llama.cpp's flash attention reads them. Knows no graph.

    [slots of head 0]...[slots of the last head][token 0, head 0][token 0, head 1]...      rows of head_dim numbers

The kernel reads as many keys for each head. Where a layer has slots, every head is given all rows, and a mask that
hides the rows of other heads; the biases of slots are added by this mask too. The kernel skips what is hidden, and
nothing is padded.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Rows, decoded
from am_memory.kv_cache.layers import CompactableLayer, SlidingLayer, TailBuffer
from am_memory.kv_cache.slots import Slots

SPARE_TOKENS = 32
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

    def exact(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a tail of so many tokens: (1, num_heads, num_tokens, head_dim) each."""
        return self.key[:, :, :num_tokens], self.value[:, :, :num_tokens]

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


class WindowPool:
    """The memory of a layer with a sliding window: what it holds, and room for as many tokens again.

    Whoever holds the newest entries may write behind them; anybody else copies what they hold into a pool of their own.

    Args:
        layer: a layer that has read a token; its entries are copied.

    Attributes:
        key, value: (1, num_heads, capacity, head_dim).
        slots, seen_key, seen_value, mask: as in `Pool`; the mask hides tokens that have left the window.
    """

    slots = None

    def __init__(self, layer: SlidingLayer) -> None:
        assert layer.keys is not None
        assert layer.values is not None
        self.window, self.num_taken = layer.sliding_window, layer.keys.shape[2]
        self._capacity = self.num_taken + max(SPARE_TOKENS, self.num_taken)
        self.key, self.value = (self._copy(held) for held in (layer.keys, layer.values))
        self.seen_key, self.seen_value = self.key[0], self.value[0]
        self.mask = torch.zeros(1, 1, self._capacity, dtype=torch.float16)
        self._lock = threading.Lock()

    def _copy(self, held: Tensor) -> Tensor:
        _, num_heads, num_tokens, head_dim = held.shape
        rows = held.new_empty(self._capacity, num_heads, head_dim).transpose(0, 1)[None]
        rows[:, :, :num_tokens] = held
        return rows

    def num_seen(self, num_tokens: int) -> int:
        """The number of rows that the kernel is given behind so many tokens of the pool."""
        return num_tokens

    def exact(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values that the last of so many tokens sees: (1, num_heads, at most the window, head_dim) each."""
        seen = slice(max(num_tokens - self.window, 0), num_tokens)
        return self.key[:, :, seen], self.value[:, :, seen]

    def take_row(self, row: int) -> bool:
        """Make room for the token behind the first `row` ones; False if it is another's, or there is none."""
        with self._lock:
            if row != self.num_taken or row == self._capacity:
                return False
            self.num_taken += 1
        self.mask[:, :, : max(row + 1 - self.window, 0)] = -torch.inf
        return True

    def hand_to(self, layer: SlidingLayer, num_tokens: int) -> None:
        """Make a layer hold what the token behind the first `num_tokens` ones sees."""
        held = slice(max(num_tokens + 1 - self.window, 0), num_tokens)
        layer.keys, layer.values = self.key[:, :, held], self.value[:, :, held]
        layer.keys.am_pool = self, num_tokens  # type: ignore[attr-defined]
        layer.cumulative_length += 1


def window_pooled(layer: SlidingLayer) -> tuple[WindowPool, int]:
    """The pool of a layer, with a row that is the next token's; and the number of tokens before that row."""
    pool, num_tokens = getattr(layer.keys, "am_pool", (None, 0))
    if pool is None or not pool.take_row(num_tokens):
        pool = WindowPool(layer)
        num_tokens = pool.num_taken
        pool.take_row(num_tokens)
    return pool, num_tokens
