"""Memory for the pools of several caches, at equal distances, as one attention of llama.cpp over all of them needs it.

Pages of memory are taken as they are written, and are given back once nothing refers to a seat any more.
Knows no graph.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from am_memory.engines.llama_cpp.pool import Pool, PoolMemory, move_in, num_slots_of
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer

SPARE_SEAT_TOKENS = 128
"""Room for further tokens in a seat."""

_PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
)


class LayerSeats:
    """The seats of one layer.

    Args:
        layers: one of each cache that shall have a seat, with a tail.
        num_attention_heads: query heads.
        num_seats: at least as many as there are layers.

    Attributes:
        seat_bytes: the distance of two seats.
    """

    def __init__(self, layers: Sequence[CompactableLayer], num_attention_heads: int, num_seats: int) -> None:
        key, value = layers[0].tail
        _, self._num_heads, _, self._head_dim = key.shape
        self._dtypes = key.dtype, value.dtype
        self._hides_heads = any(layer.slots is not None for layer in layers)
        self._num_rows = max(
            num_slots_of(layer) + (layer.length + SPARE_SEAT_TOKENS) * self._num_heads for layer in layers
        )
        num_columns = self._num_rows if self._hides_heads else self._num_rows // self._num_heads
        self._mask_shape = num_attention_heads if self._hides_heads else 1, 1, num_columns
        row_bytes = self._head_dim * sum(dtype.itemsize for dtype in self._dtypes)
        num_bytes = self._num_rows * row_bytes + 2 * self._mask_shape[0] * num_columns
        self.seat_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, num_seats * self.seat_bytes, **_PRIVATE)
        self._is_taken = [False] * num_seats
        self._pools: list[weakref.ref[Pool] | None] = [None] * num_seats

    def is_free(self, seat: int) -> bool:
        """Whether nothing refers to the memory of a seat."""
        return not self._is_taken[seat]

    def has_room(self, layer: CompactableLayer) -> bool:
        """Whether a seat could take this layer and another token."""
        num_rows = num_slots_of(layer) + (layer.length + 1) * self._num_heads
        return num_rows <= self._num_rows and (self._hides_heads or layer.slots is None)

    def holds(self, layer: CompactableLayer, seat: int) -> bool:
        """Whether a layer's content is in a seat, with room for another token."""
        held = self._pools[seat]
        pool = None if held is None else held()
        return pool is not None and pool is layer.buffer and pool.slots is layer.slots and layer.room > 0

    def move_in(self, layer: CompactableLayer, seat: int) -> None:
        """Move a layer's content into a free seat."""
        raw = np.frombuffer(self._map, np.uint8, self.seat_bytes, seat * self.seat_bytes)
        self._is_taken[seat] = True
        weakref.finalize(raw, _give_back, self._map, self._is_taken, seat, self.seat_bytes).atexit = False
        self._pools[seat] = weakref.ref(move_in(layer, self._memory(torch.from_numpy(raw)), seat))

    def _memory(self, raw: Tensor) -> PoolMemory:
        """Divide the bytes of a seat."""
        parts, start = list[Tensor](), 0
        shapes = ((self._num_rows, self._head_dim), (self._num_rows, self._head_dim), self._mask_shape)
        for shape, dtype in zip(shapes, (*self._dtypes, torch.float16), strict=True):
            end = start + math.prod(shape) * dtype.itemsize
            parts.append(raw[start:end].view(dtype).view(shape))
            start = end
        return PoolMemory(parts[0], parts[1], parts[2], self._hides_heads)


def _give_back(memory: mmap.mmap, is_taken: list[bool], seat: int, seat_bytes: int) -> None:
    """Give the pages of a seat back; another pool may have it then."""
    if hasattr(memory, "madvise"):  # not on Windows
        memory.madvise(mmap.MADV_DONTNEED, seat * seat_bytes, seat_bytes)
    is_taken[seat] = False


class Seats:
    """Seats for the pools of several caches.

    Args:
        caches: those that get the first seats, in this order.
        num_attention_heads: query heads of each layer.
    """

    def __init__(self, caches: Sequence[KVCache], num_attention_heads: Sequence[int]) -> None:
        self._num_seats = 2 * len(caches)
        columns = zip(*(cache.compactable for cache in caches), strict=True)
        self.layers = [
            LayerSeats(layers, num_heads, self._num_seats)
            for layers, num_heads in zip(columns, num_attention_heads, strict=True)
        ]
        for seat, cache in enumerate(caches):
            self._move_in(cache, seat)

    def take(self, caches: Sequence[KVCache]) -> list[int] | None:
        """Give each cache a seat, so that their seats follow one another; as few caches as possible move.

        Returns:
            The seat of each cache; None if these seats have no room for them.
        """
        held = [self._seat_of(cache) for cache in caches]
        blocks = (range(start, start + len(caches)) for start in range(self._num_seats - len(caches) + 1))
        for block in sorted(blocks, key=lambda block: -len({*block} & {*held})):
            free = [seat for seat in block if seat not in held]
            if all(layer.is_free(seat) for seat in free for layer in self.layers):
                break
        else:
            return None
        seats = [seat if seat in block else None for seat in held]
        moving = [cache for cache, seat in zip(caches, seats, strict=True) if seat is None]
        if not all(self._has_room(cache) for cache in moving):
            return None
        for cache, seat in zip(moving, free, strict=True):
            self._move_in(cache, seat)
        taken = iter(free)
        return [next(taken) if seat is None else seat for seat in seats]

    def _seat_of(self, cache: KVCache) -> int | None:
        """The seat of a cache, if all of its layers are there, with room for another token."""
        layers = cache.compactable
        seat = layers[0].buffer.seat if isinstance(layers[0].buffer, Pool) else None
        if seat is None or seat >= self._num_seats:
            return None
        is_seated = all(own.holds(layer, seat) for own, layer in zip(self.layers, layers, strict=True))
        return seat if is_seated else None

    def _has_room(self, cache: KVCache) -> bool:
        return all(own.has_room(layer) for own, layer in zip(self.layers, cache.compactable, strict=True))

    def _move_in(self, cache: KVCache, seat: int) -> None:
        for own, layer in zip(self.layers, cache.compactable, strict=True):
            own.move_in(layer, seat)
