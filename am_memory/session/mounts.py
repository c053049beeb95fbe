"""The compact texts of one context: which are mounted, since when, and by which positions their tokens are named.

A mounted text stands beside the sequence of tokens, so its tokens need names that no token has: negative positions, a
range for each text. Several texts mounted at one point stand in parallel. Knows no cache and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from am_memory.compaction.record import MountRecord
from am_memory.kv_cache.slots import Segment
from am_memory.recall.paging import Page
from am_memory.recall.search_heads import SPAN_TOKENS
from am_memory.storage.compact_text import CompactText, TextCache


@dataclass(frozen=True, eq=False)
class NamedText:
    """A compact text, and the positions that name its tokens in one context: [start, start + num_tokens)."""

    text: TextCache
    start: int

    @property
    def end(self) -> int:
        return self.start + self.text.num_tokens

    @property
    def offset(self) -> int:
        """Added to the position at which a token was read, it gives the token's name."""
        return self.start - self.text.start

    @property
    def name(self) -> str:
        return self.text.about.name

    @property
    def segments(self) -> list[Segment]:
        """Its segments by the names of their tokens."""
        offset = self.offset
        return [
            replace(segment, start=segment.start + offset, end=segment.end + offset) for segment in self.text.segments
        ]


class Mount(NamedTuple):
    """A compact text that is mounted in a session.

    Attributes:
        text: what it is.
        at_tokens: tokens of the conversation that came before it.
        recalled: its pages that are exact for now; its tokens count from 0.
    """

    text: CompactText
    at_tokens: int
    recalled: tuple[Page, ...] = ()


class Mounted(NamedTuple):
    """A text that is mounted, and when that was done."""

    named: NamedText
    record: MountRecord

    @property
    def distance(self) -> int:
        """By how many positions its keys are rotated, so that it ends where it is seen from."""
        return self.record.seen_from - self.named.text.end

    @property
    def num_slots(self) -> float:
        """Slots per KV head."""
        return self.named.text.about.num_slots


@dataclass(frozen=True)
class Mounts:
    """The compact texts of a context. Immutable: a failed step restores the old ones.

    Attributes:
        texts: all texts that `records` name, mounted now or not.
        records: what was done with them, in order.
        to_repeat: what a rebuild has yet to do with them.
    """

    texts: tuple[NamedText, ...] = ()
    records: tuple[MountRecord, ...] = ()
    to_repeat: tuple[MountRecord, ...] = ()

    def named(self, text: TextCache) -> NamedText:
        """The text with its name in this context: the one that it had before, or a free one.

        Ranges begin at multiples of `SPAN_TOKENS`, so that no span of a search holds tokens of two texts.
        """
        for known in self.texts:
            if (known.text.uid, known.name) == (text.uid, text.about.name):
                return known
        lowest = min((known.start for known in self.texts), default=0)
        return NamedText(text, (lowest - text.num_tokens) // SPAN_TOKENS * SPAN_TOKENS)

    def with_record(self, record: MountRecord, named: NamedText | None = None) -> Mounts:
        """With one more step, and its text if that is new."""
        is_known = named is None or any(known.start == named.start for known in self.texts)
        texts = self.texts if is_known or named is None else (*self.texts, named)
        return replace(self, texts=texts, records=(*self.records, record))

    def due(self, num_compactions: int, end: int) -> MountRecord | None:
        """The next step to repeat, if it was taken within the first `end` tokens and before one more compaction."""
        record = next(iter(self.to_repeat), None)
        is_due = record is not None and record.at_tokens <= end and record.num_compactions <= num_compactions
        return record if is_due else None

    def repeated(self, record: MountRecord) -> Mounts:
        """With the next step repeated."""
        return replace(self, records=(*self.records, record), to_repeat=self.to_repeat[1:])

    def resumed(self, num_tokens: int) -> Mounts:
        """With the steps beyond `num_tokens` tokens left to repeat."""
        done = tuple(record for record in self.records if record.at_tokens <= num_tokens)
        return Mounts(self.texts, done, self.records[len(done) :])

    def finished(self) -> Mounts:
        """With nothing left to repeat."""
        return Mounts(self.texts, self.records)._without_unused()

    def without_later(self, num_tokens: int, last_swap: int) -> Mounts:
        """Without steps beyond `num_tokens` tokens; those of pages that belong to a swap-in move to there."""
        kept = tuple(
            record._replace(at_tokens=min(record.at_tokens, num_tokens))
            for record in self.records
            if record.at_tokens <= (num_tokens if record.is_of_text else max(num_tokens, last_swap))
        )
        return Mounts(self.texts, kept)._without_unused()

    def _without_unused(self) -> Mounts:
        used = {record.start for record in self.records if record.is_of_text}
        return Mounts(tuple(named for named in self.texts if named.start in used), self.records)

    @cached_property
    def mounted(self) -> tuple[Mounted, ...]:
        """The texts that are mounted now, in the order in which they were."""
        found: dict[int, Mounted] = {}
        for record in self.records:
            if record.is_of_text:
                found.pop(record.start, None)
                if record.is_there:
                    found[record.start] = Mounted(self.holding(record.start), record)
        return tuple(found.values())

    @cached_property
    def exact_pages(self) -> tuple[Page, ...]:
        """The pages of mounted texts that are exact now; the one recalled last stands at the end."""
        found: dict[Page, None] = {}
        for record in self.records:
            if not record.is_of_text:
                found.pop(page := Page(record.start, record.end), None)
                if record.is_there:
                    found[page] = None
        return tuple(found)

    def holding(self, position: int) -> NamedText:
        """The text one of whose tokens has this name."""
        return next(named for named in self.texts if named.start <= position < named.end)

    def mounted_as(self, name: str) -> Mounted | None:
        """The mounted text of that name."""
        return next((mounted for mounted in self.mounted if mounted.named.name == name), None)

    def without_lost(self) -> Mounts:
        """Without originals that turned out to be lost."""
        texts = tuple(replace(named, text=named.text.without_lost()) for named in self.texts)
        return replace(self, texts=texts)

    @cached_property
    def size(self) -> float:
        """Slots per KV head of all mounted texts."""
        return sum(mounted.num_slots for mounted in self.mounted)

    def waiting(self, num_tokens: int) -> list[Mounted]:
        """The mounted texts that are not in the cache yet, because it holds only `num_tokens` tokens."""
        return [mounted for mounted in self.mounted if num_tokens < mounted.record.seen_from]

    def shown(self, recalled: Sequence[Page]) -> tuple[Mount, ...]:
        """The mounted texts for people.

        Args:
            recalled: all pages that are exact.
        """
        found = []
        for named, record in self.mounted:
            pages = [page for page in recalled if page.is_within(named.start, named.end)]
            moved = tuple(Page(page.start - named.start, page.end - named.start) for page in pages)
            found.append(Mount(named.text.about, record.at_tokens, moved))
        return tuple(found)

    def has(self, page: Page) -> bool:
        """Whether a page is of a segment of a mounted text."""
        segments = (segment for mounted in self.mounted for segment in mounted.named.segments)
        return any(page.is_within(segment.start, segment.end) for segment in segments)


NO_MOUNTS = Mounts()
