"""Segments that are exact again for a while, and go back to the slots that they had.

A recall is no decision about what is worth keeping: it pages a segment in, and whatever needs the room pages it out.
The cache is afterwards, to the bit, what it would have been without. Knows no tokens, and not when there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import device

from am_memory.cache import CacheState, KVCache, Segment, Slots
from am_memory.originals import LayerEntries


@dataclass(frozen=True)
class Recalled:
    """A segment that is exact for now.

    Attributes:
        slots: of each compactable layer, in host memory: what it goes back to.
    """

    segment: Segment
    slots: tuple[Slots, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for slots in self.slots for tensor in slots.tensors)


def brought_back(cache: KVCache, segment: Segment, entries: Sequence[LayerEntries]) -> tuple[CacheState, Recalled]:
    """The state in which a segment is exact; the cache is as it was.

    Args:
        entries: of each compactable layer, the segment's tokens.
    """
    compact, exact = [], []
    for layer, (key, value) in zip(cache.compactable, entries, strict=True):
        assert layer.slots is not None
        compact.append(layer.slots.within(segment.start, segment.end).to("cpu"))
        exact.append(Slots.recalled(key, value, segment.start).to(layer.slots.key.device))
    return cache.exchanged(segment, exact), Recalled(segment, tuple(compact))


def put_away(cache: KVCache, recalled: Recalled) -> CacheState:
    """The state in which a segment is compact again; the cache is as it was."""
    return cache.exchanged(recalled.segment, [slots.to(_device(cache)) for slots in recalled.slots])


def at_rest(cache: KVCache, recalled: Sequence[Recalled]) -> CacheState:
    """The state in which nothing is recalled; the cache is as it was."""
    state = cache.state()
    try:
        for each in recalled:
            cache.restore(put_away(cache, each))
        return cache.state()
    finally:
        cache.restore(state)


def _device(cache: KVCache) -> device:
    slots = cache.compactable[0].slots
    assert slots is not None
    return slots.key.device
