"""What a search of one context covers: its tokens, and the mounted texts behind them, in one row of places.

A place below `num_places` is a token's logical position. Behind these stand the texts, each from a multiple of
`SPAN_TOKENS` on, so that no span holds tokens of two texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from am_memory.events import Span
from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import Original, are_kept, kept_spans
from am_memory.recall.paging import Page
from am_memory.recall.search import SearchedText, page_score
from am_memory.recall.search_heads import SPAN_TOKENS
from am_memory.session.context import Context
from am_memory.session.mounts import NamedText


@dataclass(frozen=True)
class _Part:
    """One of the texts: `shift` is added to the position at which a token was read, and gives its place."""

    named: NamedText
    searched: SearchedText

    @property
    def shift(self) -> int:
        return self.searched.num_spans_before * SPAN_TOKENS


@dataclass(frozen=True)
class SearchSpace:
    """All that one search covers.

    Attributes:
        num_places: of the context's own tokens.
        token_ids, segments: of tokens and texts, by their places.
    """

    originals: Sequence[Original]
    num_places: int
    token_ids: Sequence[int]
    segments: Sequence[Segment]
    parts: Sequence[_Part] = ()

    @classmethod
    def of(cls, context: Context, num_tokens: int) -> SearchSpace:
        """The first tokens of a context, and its mounted texts."""
        num_spans, parts = -(-num_tokens // SPAN_TOKENS), list[_Part]()
        num_places = num_spans * SPAN_TOKENS
        plain = cls(context.originals, num_places, context.tokens, context.cache.segments)
        mounted = [mounted for mounted in context.mounts.mounted if can_search(mounted.named)]
        if not mounted:
            return plain
        token_ids, segments = padded(context.tokens[:num_places]), [*plain.segments]
        for named, distance in ((one.named, one.distance) for one in mounted):
            text, first = named.text, named.text.start // SPAN_TOKENS
            count = -(-text.end // SPAN_TOKENS) - first
            before = len(token_ids) // SPAN_TOKENS - first
            part = _Part(named, SearchedText(text.tokens, text.segments, text.originals, distance, before, count))
            parts.append(part)
            token_ids += padded(text.tokens[first * SPAN_TOKENS :])
            segments += [replace(s, start=s.start + part.shift, end=s.end + part.shift) for s in text.segments]
        return cls(plain.originals, num_places, token_ids, segments, parts)

    @property
    def texts(self) -> list[SearchedText]:
        return [part.searched for part in self.parts]

    def kept(self, num_spans: int) -> Tensor:
        """(num_spans,) bool: whether any token of a span has an original."""
        is_there = torch.zeros(num_spans, dtype=torch.bool)
        for start, end in kept_spans(self.originals):
            is_there[start // SPAN_TOKENS : -(-end // SPAN_TOKENS)] = True
        for part in self.parts:
            for start, end in kept_spans(part.searched.originals):
                is_there[part.searched.spans(start, end)] = True
        return is_there

    def are_kept(self, page: Page) -> bool:
        """Whether all tokens of a page have originals."""
        part = self._part(page)
        if part is None:
            return are_kept(self.originals, page.start, page.end)
        return are_kept(part.searched.originals, page.start - part.shift, page.end - part.shift)

    def named(self, page: Page) -> Page:
        """The page by the names of its tokens in the context, instead of their places."""
        part = self._part(page)
        if part is None:
            return page
        moved = part.named.offset - part.shift
        return Page(page.start + moved, page.end + moved)

    def span(self, context: Context, page: Page, scores: Tensor) -> Span:
        """A page for people."""
        text, score = context.engine.decode(self.token_ids[page.start : page.end]), page_score(scores, page)
        part = self._part(page)
        if part is None:
            return Span(page.start, page.end, score, text)
        first = part.shift + part.named.text.start
        return Span(page.start - first, page.end - first, score, text, part.named.name)

    def _part(self, page: Page) -> _Part | None:
        """The text that holds a page; None: the page is of the context's own tokens."""
        if page.start < self.num_places:
            return None
        return next(part for part in reversed(self.parts) if page.start >= part.shift + part.named.text.start)


def can_search(named: NamedText) -> bool:
    """Whether pages of a text can be found."""
    return any(original.lost is None for original in named.text.originals)


def padded(token_ids: Sequence[int]) -> list[int]:
    """The tokens, and others up to the end of the last span."""
    return [*token_ids, *[0] * (-len(token_ids) % SPAN_TOKENS)]
