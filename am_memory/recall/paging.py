"""Paging: a segment becomes exact for a while, and later gets back the slots that it had.

A recall does not decide what is worth keeping. It pages a segment in, and whatever needs the room pages it out again;
then the cache is bit for bit what it would be without the recall. Does not know when there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from am_memory.kv_cache.cache import CacheState, Snapshot, exchanged
from am_memory.kv_cache.layers import TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.recall.originals import KeysAndValues


@dataclass(frozen=True)
class Recalled:
    """A segment that is exact at the moment.

    Attributes:
        slots: its compact slots in each compactable layer, in host memory; it gets them back.
    """

    segment: Segment
    slots: tuple[Slots, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for slots in self.slots for tensor in slots.tensors)


def brought_back(state: Snapshot, segment: Segment, entries: Sequence[KeysAndValues]) -> tuple[CacheState, Recalled]:
    """The state with a segment exact, and what to put away later.

    Args:
        entries: keys and values of the segment's tokens in each compactable layer.
    """
    compact, exact = [], []
    for slots, (key, value) in zip(_slots(state), entries, strict=True):
        compact.append(slots.within(segment.start, segment.end).to("cpu"))
        exact.append(Slots.recalled(key, value, segment.start).to(slots.bias.device))
    return exchanged(state, segment, exact), Recalled(segment, tuple(compact))


def put_away(state: Snapshot, recalled: Recalled) -> CacheState:
    """The state with a recalled segment compact again."""
    compact = [mine.to(held.bias.device) for mine, held in zip(recalled.slots, _slots(state), strict=True)]
    return exchanged(state, recalled.segment, compact)


def at_rest(state: Snapshot, recalled: Sequence[Recalled]) -> Snapshot:
    """The state with all recalled segments compact again."""
    return reduce(put_away, recalled, state)


def _slots(state: Snapshot) -> list[Slots]:
    """The slots of each compactable layer, once something has been compacted."""
    return [layer.slots for layer in state.layers if isinstance(layer, TailState) and layer.slots is not None]
