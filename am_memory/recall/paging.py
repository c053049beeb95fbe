"""Segments that are exact again for a while, and go back to the slots that they had.

A recall is no decision about what is worth keeping: it pages a segment in, and whatever needs the room pages it out.
The cache is afterwards, to the bit, what it would have been without. Knows no tokens, and not when there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from am_memory.kv_cache.cache import CacheState, Snapshot, exchanged
from am_memory.kv_cache.layers import TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.recall.originals import LayerEntries


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


def brought_back(state: Snapshot, segment: Segment, entries: Sequence[LayerEntries]) -> tuple[CacheState, Recalled]:
    """The state in which a segment is exact.

    Args:
        entries: of each compactable layer, the segment's tokens.
    """
    compact, exact = [], []
    for slots, (key, value) in zip(_slots(state), entries, strict=True):
        compact.append(slots.within(segment.start, segment.end).to("cpu"))
        exact.append(Slots.recalled(key, value, segment.start).to(slots.bias.device))
    return exchanged(state, segment, exact), Recalled(segment, tuple(compact))


def put_away(state: Snapshot, recalled: Recalled) -> CacheState:
    """The state in which a segment is compact again."""
    compact = [mine.to(held.bias.device) for mine, held in zip(recalled.slots, _slots(state), strict=True)]
    return exchanged(state, recalled.segment, compact)


def at_rest(state: Snapshot, recalled: Sequence[Recalled]) -> Snapshot:
    """The state in which nothing is recalled."""
    return reduce(put_away, recalled, state)


def _slots(state: Snapshot) -> list[Slots]:
    """Of each compactable layer; something is compacted."""
    return [layer.slots for layer in state.layers if isinstance(layer, TailState) and layer.slots is not None]
