"""Search: find the compacted tokens that a text is about, by the model's own attention.

The search heads (`search_heads.py`) compare their queries for the text with the exact keys of everything compacted, and
of the exact tail. A span's score is the log of how much more attention it gets than usual, mean over the search heads.
Knows no session.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import Original
from am_memory.recall.paging import Page, joined
from am_memory.recall.search_heads import SPAN_TOKENS, SearchHeads, lift, search_heads
from am_memory.recall.search_index import SpanMass, runs, span_mass, usual_distance
from am_memory.text.boundaries import best_boundary

PASSAGE_TOKENS = 32
"""A long text is searched for in passages of this many tokens, since the mean of many tokens looks for nothing."""
MARGIN_TOKENS = 16
"""Tokens on each side of a span that belong to its page."""
MIN_SCORE = -1e30
"""Below every score of a compacted span."""
BOUNDARY_TOKENS = 4
"""How far a page's ends may move to a boundary of the text."""


def span_scores(
    engine: Engine, cache: SessionCache, originals: Sequence[Original], queries: Tensor, num_tokens: int
) -> Tensor:
    """The score of each span of the first `num_tokens` tokens; -inf for spans without a compacted token.

    Args:
        cache: holds these tokens.
        queries: (num_search_heads, num_queries, head_dim) float32 on the CPU, of the text.
        originals: tokens that have one are found by it, others by their slots.

    Returns:
        (ceil(num_tokens / SPAN_TOKENS),) float32, in nats.

    Raises:
        OriginalLost: an original turned out to be lost.
    """
    found = search_heads(engine, cache)
    search = _Search(cache, originals, found, num_tokens, can_rotate=engine.capabilities.can_rotate_keys)
    lifts = torch.stack([search.lifts(index, query) for index, query in enumerate(queries)])
    scores = lifts.mean(dim=0).amax(dim=0)  # of (num_heads, num_passages, num_spans)
    is_compact = torch.zeros(len(scores), dtype=torch.bool)
    for segment in cache.segments:
        is_compact[segment.start // SPAN_TOKENS : (segment.end - 1) // SPAN_TOKENS + 1] = True
    return scores.masked_fill(~is_compact, -torch.inf)


@dataclass
class _Search:
    """One search among the first `num_tokens` tokens."""

    cache: SessionCache
    originals: Sequence[Original]
    found: SearchHeads
    num_tokens: int
    can_rotate: bool

    def lifts(self, index: int, query: Tensor) -> Tensor:
        """(num_passages, num_spans): how much more attention spans get from each passage of a text, at one search head.

        Args:
            query: (num_queries, head_dim) float32, of the text at search head `index`.
        """
        usual = self._usual(index, self.num_tokens)
        shares = [torch.full((len(one), -(-self.num_tokens // SPAN_TOKENS)), -torch.inf) for one in (query, usual)]
        for masses in chain(self._of_originals(index, query), self._of_others(index, query, usual)):
            for share, mass in zip(shares, masses, strict=True):
                kept = mass.mass[:, : share.shape[1] - mass.first]
                where = slice(mass.first, mass.first + kept.shape[1])
                share[:, where] = torch.logaddexp(share[:, where], kept)
        asked, usually = (share.softmax(dim=1) for share in shares)
        passages = torch.split(asked, PASSAGE_TOKENS)
        return torch.stack([lift(passage.mean(dim=0), usually.mean(dim=0)) for passage in passages])

    def _usual(self, index: int, position: int) -> Tensor:
        """The usual queries of one search head, as they are at a position."""
        usual = self.found.usual[index]
        if not self.can_rotate:
            return usual
        layer = self.cache.compactable[self.found.heads[index].layer]
        return layer.rotated(usual[None], position - self.found.position)[0].float()

    def _of_originals(self, index: int, query: Tensor) -> Iterator[tuple[SpanMass, SpanMass]]:
        """The mass of the text's and of the usual queries on each run of originals."""
        layer = self.cache.compactable[self.found.heads[index].layer]
        for run, shift in runs(self.found, self.originals, self.cache.segments):
            if run.start >= self.num_tokens:
                return
            positions = torch.arange(run.start, min(run.start + run.num_tokens, self.num_tokens))
            key, scaling = run.keys[index][: len(positions)], layer.scaling or 0.0
            distance = usual_distance(self.num_tokens - shift - run.start)
            known = run.usual_mass(index, distance, len(positions))
            if known is None:
                known = span_mass(self._usual(index, run.start + distance), key, None, positions, scaling)
                run.keep_usual(index, distance, len(positions), known)
            turned = layer.rotated(query[None], -shift)[0].float()
            yield span_mass(turned, key, None, positions, scaling), known

    def _of_others(self, index: int, query: Tensor, usual: Tensor) -> Iterator[tuple[SpanMass, SpanMass]]:
        """The mass on slots of tokens without an original, and on the exact tail."""
        _, head, _ = self.found.heads[index]
        layer = self.cache.compactable[self.found.heads[index].layer]
        both, count, scaling = torch.cat([query, usual]), len(query), layer.scaling or 0.0
        if layer.slots is not None:
            slots = layer.slots.head(head)
            positions = slots.positions.long()
            is_found = self._is_without_original[positions.clamp_max(self.num_tokens - 1)]
            slots = slots.where(is_found & (positions >= self.cache.num_pinned_slots) & (positions < self.num_tokens))
            if len(slots.positions):
                bias = slots.bias.float().cpu()
                mass = span_mass(both, decoded(slots.key).cpu(), bias, slots.positions.long(), scaling)
                yield _split(mass, count)
        if self.cache.tail_start < self.num_tokens:
            key = layer.exact_entries(self.cache.tail_start, self.num_tokens)[0][head]
            mass = span_mass(both, key.cpu(), None, torch.arange(self.cache.tail_start, self.num_tokens), scaling)
            yield _split(mass, count)

    @cached_property
    def _is_without_original(self) -> Tensor:
        """(num_tokens,) bool."""
        is_without = torch.ones(self.num_tokens, dtype=torch.bool)
        for original in self.originals:
            is_without[original.start : original.end] = original.lost is not None
        return is_without


def _split(mass: SpanMass, count: int) -> tuple[SpanMass, SpanMass]:
    """The mass of the first `count` queries, and of the others."""
    return SpanMass(mass.first, mass.mass[:count]), SpanMass(mass.first, mass.mass[count:])


def best_pages(
    engine: Engine,
    token_ids: Sequence[int],
    segments: Sequence[Segment],
    scores: Tensor,
    *,
    least_score: float = MIN_SCORE,
    max_tokens: int | None = None,
    max_pages: int | None = None,
) -> list[Page]:
    """The pages around the best spans, in the order of their tokens.

    Args:
        scores: of the spans, from `span_scores`.
        least_score: spans below it are left out.
        max_tokens: upper bound on the tokens of all pages together; None: no bound.
        max_pages: no more spans are added once there are so many pages; None: no bound.
    """
    pages: list[Page] = []
    for span in scores.argsort(descending=True, stable=True).tolist():
        if not scores[span] >= least_score:
            break
        more = joined([*pages, *_around(engine, token_ids, segments, span)])
        if max_tokens is not None and sum(page.num_tokens for page in more) > max_tokens:
            break
        if max_pages is not None and len(more) > max_pages <= len(pages):
            break  # but a span across two segments may be one page too many
        pages = more
    return pages


def page_score(scores: Tensor, page: Page) -> float:
    """The best score of a page's spans."""
    return float(scores[page.start // SPAN_TOKENS : (page.end - 1) // SPAN_TOKENS + 1].max())


def _around(engine: Engine, token_ids: Sequence[int], segments: Sequence[Segment], span: int) -> Iterator[Page]:
    """A span with its margins, cut at the edges of segments, and ending at boundaries of the text."""
    start, end = span * SPAN_TOKENS - MARGIN_TOKENS, (span + 1) * SPAN_TOKENS + MARGIN_TOKENS
    for segment in segments:
        if segment.start < end - MARGIN_TOKENS and segment.end > start + MARGIN_TOKENS:
            yield Page(*(_boundary(engine, token_ids, segment, edge) for edge in (start, end)))


def _boundary(engine: Engine, token_ids: Sequence[int], segment: Segment, edge: int) -> int:
    if not segment.start < edge < segment.end:
        return min(max(edge, segment.start), segment.end)
    earliest, latest = max(edge - BOUNDARY_TOKENS, segment.start), min(edge + BOUNDARY_TOKENS, segment.end)
    return best_boundary(engine, token_ids, max(earliest, 1), min(latest, len(token_ids) - 1))
