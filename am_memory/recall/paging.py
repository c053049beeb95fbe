"""Paging: the tokens of a page become exact for a while, and later get back the slots that they had.

A recall does not decide what is worth keeping. It pages tokens in, and whatever needs the room pages them out again;
then the cache is bit for bit what it would be without the recall. The other slots of the page's segment stay as they
are: they stand for a little of the page as well, which changes attention less than fitting every page by itself
(docs/log.md). Does not know when there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from am_memory.engines.base import SessionLayer
from am_memory.kv_cache.cache import CacheState, Snapshot, exchanged
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.layers import TailState
from am_memory.kv_cache.slots import Slots
from am_memory.recall.originals import KeysAndValues

PAGE_BIAS = 1.5
"""Added to the scores of a page's entries, in nats. Slots get more attention from questions that are not about their
block than its tokens did, and drown what was looked up (docs/log.md)."""


class Page(NamedTuple):
    """The logical tokens [start, end), all of one segment."""

    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    def is_within(self, start: int, end: int) -> bool:
        """Whether it holds tokens of [start, end) alone, and at least one."""
        return start <= self.start < self.end <= end


def joined(pages: Sequence[Page]) -> list[Page]:
    """Pages in the order of their tokens; those that overlap become one. Pages of two segments never overlap."""
    found: list[Page] = []
    for page in sorted(pages):
        if found and page.start < found[-1].end:
            found[-1] = Page(found[-1].start, max(page.end, found[-1].end))
        else:
            found.append(page)
    return found


@dataclass(frozen=True)
class Recalled:
    """A page that is exact at the moment.

    Attributes:
        slots: its compact slots in each compactable layer, in host memory; it gets them back.
    """

    page: Page
    slots: tuple[Slots, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for slots in self.slots for tensor in slots.tensors)

    @property
    def extra_slots(self) -> int:
        """Entries that the page takes beyond its slots, over all layers and KV heads."""
        return sum(self.page.num_tokens * slots.num_heads - slots.num_slots for slots in self.slots)


def brought_back(
    state: Snapshot, page: Page, entries: Sequence[KeysAndValues], *, is_whole: bool
) -> tuple[CacheState, Recalled]:
    """The state with a page exact, and what to put away later.

    The page's entries weigh a little more than they did, unless the page is a whole segment: see `PAGE_BIAS`.

    Args:
        entries: keys and values of the page's tokens in each compactable layer.
        is_whole: the page is a whole segment, of the conversation or of a mounted text.
    """
    bias = 0.0 if is_whole else PAGE_BIAS
    compact, exact = [], []
    tails = (layer for layer in state.layers if isinstance(layer, TailState))
    for (slots, buffer, _, _), (key, value) in zip(tails, entries, strict=True):
        assert buffer is not None
        exact.append(Slots.recalled(key, value, page.start, bias).to(buffer.key.device))
        none = Slots.recalled(key[:, :0], value[:, :0], page.start)  # of a text that was compacted to no slots
        compact.append(none if slots is None else slots.within(page.start, page.end).to("cpu"))
    return exchanged(state, page, exact), Recalled(page, tuple(compact))


def put_away(state: Snapshot, recalled: Recalled) -> CacheState:
    """The state with a recalled page compact again."""
    compact = [mine.to(held.bias.device) for mine, held in zip(recalled.slots, slots_of(state), strict=True)]
    return exchanged(state, recalled.page, compact)


def at_rest(state: Snapshot, recalled: Sequence[Recalled]) -> Snapshot:
    """The state with all recalled pages compact again."""
    return reduce(put_away, recalled, state)


def with_new_slots(
    state: Snapshot, recalled: Sequence[Recalled], tokens: tuple[int, int], new_slots: Sequence[Slots]
) -> tuple[CacheState, tuple[Recalled, ...]]:
    """The state with other slots for a segment, whose recalled pages stay exact, and all pages to put away later.

    Args:
        recalled: the pages that are exact in this state.
        tokens: [start, end) of the segment.
        new_slots: one `Slots` for each compactable layer.
    """
    result, after = exchanged(state, tokens, new_slots), list(recalled)
    for index, page in enumerate(held.page for held in recalled):
        if tokens[0] <= page.start < tokens[1]:
            after[index] = Recalled(page, tuple(slots.within(*page).to("cpu") for slots in slots_of(result)))
            result = exchanged(result, page, [slots.within(*page) for slots in slots_of(state)])
    return result, tuple(after)


def slots_of(state: Snapshot) -> list[Slots]:
    """The slots of each compactable layer, once something has been compacted."""
    return [layer.slots for layer in state.layers if isinstance(layer, TailState) and layer.slots is not None]


def turned(slots: Slots, layer: SessionLayer, distance: int) -> Slots:
    """The slots with their keys rotated by a distance in positions."""
    return slots.with_key(layer.rotated(decoded(slots.key)[None], distance)[0]) if distance else slots
