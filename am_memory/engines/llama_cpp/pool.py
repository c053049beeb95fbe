"""A layer's slots and exact tail in one piece of memory, as llama.cpp's flash attention reads them. Knows no graph.

    [slots of head 0]...[slots of the last head][token 0, head 0][token 0, head 1]...      rows of head_dim numbers

The kernel reads as many keys for each head. Where a layer has slots, every head is given all rows, and a mask that
hides the rows of other heads; the biases of slots are added by this mask too. The kernel skips what is hidden.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Rows, decoded
from am_memory.kv_cache.layers import CompactableLayer, SlidingLayer, TailBuffer
from am_memory.kv_cache.slots import Slots

SPARE_TOKENS = 32
"""The least room for further tokens in a new pool, which is a copy of the last one; longer tails get a 32nd part of
them."""


class PoolMemory(NamedTuple):
    """Memory for one pool.

    Attributes:
        key_rows, value_rows: (num_rows, head_dim).
        mask: (num_attention_heads, 1, num_rows) float16 if heads are hidden from each other, as slots need it; else
            (1, 1, num_rows / num_heads).
        hides_heads: which of both.
    """

    key_rows: Tensor
    value_rows: Tensor
    mask: Tensor
    hides_heads: bool


def num_slots_of(layer: CompactableLayer) -> int:
    """The slots of all heads of a layer."""
    return 0 if layer.slots is None else layer.slots.num_slots


def memory_for(layer: CompactableLayer, num_attention_heads: int) -> PoolMemory:
    """Memory for a layer that has a tail, with spare room."""
    key, value = layer.tail
    _, num_heads, num_tokens, head_dim = key.shape
    num_slots, capacity = num_slots_of(layer), num_tokens + max(SPARE_TOKENS, num_tokens // 32)
    key_rows = key.new_empty(num_slots + capacity * num_heads, head_dim)
    mask_shape = (num_attention_heads, 1, len(key_rows)) if num_slots else (1, 1, capacity)
    value_rows = torch.empty_like(key_rows, dtype=value.dtype)
    return PoolMemory(key_rows, value_rows, torch.empty(mask_shape, dtype=torch.float16), bool(num_slots))


class Pool(TailBuffer):
    """The content of one layer; `key` and `value` are the part of the tail.

    Args:
        layer: a layer that has a tail; its entries are copied.
        memory: has room for them.
        seat: where among the pools of several caches the memory lies; None: it is this pool's alone.

    Attributes:
        slots: the layer's slots, whose keys and values are in the pool unless they are in int8.
        seen_key, seen_value: (num_heads, num_seen, head_dim), views of the rows that the kernel is given.
        mask: biases of slots, 0 for exact entries, -inf for other heads' rows and what is not shown.
        num_slots: rows before the tail.
    """

    def __init__(self, layer: CompactableLayer, memory: PoolMemory, seat: int | None = None) -> None:
        key, value = layer.tail
        _, num_heads, num_tokens, head_dim = key.shape
        self.num_slots, self.seat, self.mask = num_slots_of(layer), seat, memory.mask
        self._memory, self._num_heads = memory, num_heads
        capacity = (len(memory.key_rows) - self.num_slots) // num_heads
        self._tail_shape = capacity, num_heads, head_dim
        super().__init__(self._tail(memory.key_rows), self._tail(memory.value_rows))
        self.key[:, :, :num_tokens], self.value[:, :, :num_tokens] = key, value
        self._starts = [(part.data_ptr(), part.stride(2) * part.element_size()) for part in (self.key, self.value)]
        self.slots = self._taken_in(layer.slots)
        if memory.hides_heads:
            self.seen_key, self.seen_value = (rows.expand(num_heads, -1, -1) for rows in memory[:2])
        else:
            self.seen_key, self.seen_value = self.key[0], self.value[0]
        self._tail_mask = self._new_mask()
        self._num_shown = 0
        self.show(num_tokens if seat is not None else capacity)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the pool takes: the tail, the mask, and slots that are nowhere else."""
        num_own = self.num_slots if self.slots is not None and not isinstance(self.slots.key, Tensor) else 0
        return (self.key, self.value, self.mask, *(rows[:num_own] for rows in self._memory[:2]))

    def num_seen(self, num_tokens: int) -> int:
        """The number of rows that the kernel is given if the tail has so many tokens."""
        return self.num_slots + num_tokens * self._num_heads if self._memory.hides_heads else num_tokens

    def exact(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a tail of so many tokens: (1, num_heads, num_tokens, head_dim) each."""
        return self.key[:, :, :num_tokens], self.value[:, :, :num_tokens]

    def addresses(self, num_tokens: int) -> tuple[int, int]:
        """Where the key and the value behind so many tokens of the tail are written."""
        key, value = self._starts
        return key[0] + num_tokens * key[1], value[0] + num_tokens * value[1]

    def show(self, num_tokens: int) -> None:
        """Let the mask show so many tokens of the tail."""
        if num_tokens > self._num_shown:
            self._tail_mask[:, self._num_shown : num_tokens] = 0.0
        elif num_tokens < self._num_shown:
            self._tail_mask[:, num_tokens : self._num_shown] = -np.inf
        self._num_shown = num_tokens

    def _tail(self, rows: Tensor) -> Tensor:
        """The rows of the tail, (1, num_heads, capacity, head_dim)."""
        num_rows = self._tail_shape[0] * self._tail_shape[1]
        return rows[self.num_slots : self.num_slots + num_rows].view(self._tail_shape).transpose(0, 1)[None]

    def _taken_in(self, slots: Slots | None) -> Slots | None:
        """Copy slots into the pool; returns them as views of it."""
        if slots is None:
            return None
        key, value = (rows[: self.num_slots] for rows in self._memory[:2])
        key.copy_(decoded(slots.key))
        value.copy_(decoded(slots.value))
        return replace(slots, key=_in(key, slots.key), value=_in(value, slots.value))

    def _new_mask(self) -> np.ndarray[Any, Any]:
        """Hide all but the slots; returns the mask of each head's own rows in the tail, (..., capacity, num_heads)."""
        capacity, num_heads, _ = self._tail_shape
        self.mask.fill_(-torch.inf)
        if not self._memory.hides_heads:
            return self.mask[:, 0, :capacity].numpy()
        by_head = self.mask.view(num_heads, -1, self.mask.shape[-1])  # (num_heads, num_groups, num_rows)
        if self.slots is not None:
            for head, (start, end) in enumerate(pairwise(self.slots.cu_slots)):
                by_head[head, :, start:end] = self.slots.bias[start:end]
        tail = by_head[..., self.num_slots : self.num_slots + capacity * num_heads]
        tail = tail.unflatten(2, (capacity, num_heads))  # type: ignore[no-untyped-call]
        own: np.ndarray[Any, Any] = tail.diagonal(dim1=0, dim2=3).numpy()  # (num_groups, capacity, num_heads)
        return own


def _in(pool: Tensor, rows: Rows) -> Rows:
    """The rows as a view of the pool; int8 rows stay what they are."""
    return pool if isinstance(rows, Tensor) else rows


def pooled(layer: CompactableLayer, num_attention_heads: int) -> Pool:
    """The layer's pool in memory of its own, with room for another token; a new one if it has none."""
    pool = layer.buffer
    if not isinstance(pool, Pool) or pool.slots is not layer.slots or not layer.room or pool.seat is not None:
        pool = move_in(layer, memory_for(layer, num_attention_heads))
    return pool


def move_in(layer: CompactableLayer, memory: PoolMemory, seat: int | None = None) -> Pool:
    """Move a layer's content into a new pool."""
    pool = layer.buffer = Pool(layer, memory, seat)
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
