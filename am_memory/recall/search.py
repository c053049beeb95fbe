"""Search: find the compacted tokens that a text is about, by the model's own attention and by rare words.

The search heads (`search_heads.py`) compare their queries for the text with the exact keys of everything compacted, and
of the exact tail. A span's score is the log of how much more attention it gets than usual, mean over the search heads,
and what it adds for the rare words that it shares with the text (`words.py`). Knows no session.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, SessionLayer
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import Original, kept_spans
from am_memory.recall.paging import Page, joined
from am_memory.recall.search_heads import SPAN_TOKENS, lift, search_heads
from am_memory.recall.search_index import Masses, Run, Spans, Usual, masses_of_slots, runs, shares_of, usual_distance
from am_memory.recall.words import word_numbers, word_scores
from am_memory.text.boundaries import best_boundary

PASSAGE_TOKENS = 32
"""A long text is searched for in passages of this many tokens, since the mean of many tokens looks for nothing."""
MARGIN_TOKENS = 16
"""Tokens on each side of a span that belong to its page."""
MIN_SCORE = -1e30
"""Below every score of a compacted span."""
EXACT_SPANS, EXACT_SHARE = 1024, 0.1
"""At least so many spans, and at least this share of them, are compared exactly; the others of a longer history not."""
BOUNDARY_TOKENS = 4
"""How far a page's ends may move to a boundary of the text."""


class Sought(NamedTuple):
    """The text that is searched for.

    Attributes:
        token_ids: its tokens.
        queries: (num_search_heads, num_tokens, head_dim) float32 on the CPU: those of the search heads for them.
    """

    token_ids: Sequence[int]
    queries: Tensor


class SearchedText(NamedTuple):
    """A mounted text, as a search sees it: its spans stand behind those of the conversation.

    Attributes:
        token_ids: its tokens, from position 0 on.
        segments, originals: of its tokens, at the positions at which these were read.
        distance: by how many positions its keys are rotated, beside the shift of each segment.
        num_spans_before: from a span by these positions to its place among all spans.
        num_spans: how many there are.
    """

    token_ids: Sequence[int]
    segments: Sequence[Segment]
    originals: Sequence[Original]
    distance: int
    num_spans_before: int
    num_spans: int

    def spans(self, start: int, end: int) -> slice:
        """The places of the spans with the tokens [start, end)."""
        return slice(start // SPAN_TOKENS + self.num_spans_before, -(-end // SPAN_TOKENS) + self.num_spans_before)


def span_scores(
    engine: Engine,
    cache: SessionCache,
    originals: Sequence[Original],
    sought: Sought,
    token_ids: Sequence[int],
    texts: Sequence[SearchedText] = (),
) -> Tensor:
    """The score of each span of some tokens, and of the mounted texts.

    In a long history a first look, at means of neighbouring keys, chooses the spans that are compared exactly.

    Args:
        cache: holds these tokens.
        originals: tokens that have one are found by it, others by their slots.
        sought: what to search for.
        token_ids: the first tokens of the cache.
        texts: the mounted texts.

    Returns:
        (ceil(len(token_ids) / SPAN_TOKENS) + spans of the texts,) float32, in nats. `MIN_SCORE` for spans that the
        first look left out; -inf for spans without a compacted token.

    Raises:
        OriginalLost: an original turned out to be lost.
    """
    search = _Search(engine, cache, originals, sought, token_ids, texts)
    heads = [search.head(index, query) for index, query in enumerate(sought.queries)]
    scores = search.scores(heads)
    if not search.is_rough:
        return scores
    chosen = scores.topk(max(EXACT_SPANS, int(EXACT_SHARE * len(scores)))).indices.sort().values
    search.look_closely(heads, chosen)
    exact = search.scores(heads)
    return torch.where(scores.isfinite(), MIN_SCORE, scores).index_copy(0, chosen, exact[chosen])


@dataclass
class _Head:
    """One search head in a search.

    Attributes:
        query: (num_queries, head_dim) float32, of the text, multiplied by the scale of the scores.
        asked: the masses of these queries; those of runs come first.
        usual: (num_spans,) the share of the usual queries' attention.
    """

    query: Tensor
    asked: list[Masses]
    usual: Tensor


class _Search:
    """One search among some tokens; see `span_scores`."""

    def __init__(
        self,
        engine: Engine,
        cache: SessionCache,
        originals: Sequence[Original],
        sought: Sought,
        token_ids: Sequence[int],
        texts: Sequence[SearchedText],
    ) -> None:
        self.cache, self.originals, self.texts = cache, originals, texts
        self.found, self.can_rotate = search_heads(engine, cache), engine.capabilities.can_rotate_keys
        self.num_tokens = num_tokens = len(token_ids)
        self.num_spans_of_tokens = -(-num_tokens // SPAN_TOKENS)
        self.num_spans = self.num_spans_of_tokens + sum(text.num_spans for text in texts)
        self.is_rough = self.num_spans > EXACT_SPANS
        self.runs, words = list[tuple[Run, int, slice]](), list[tuple[Tensor, int]]()
        for run, shift in runs(self.found, originals, cache.segments):
            if run.start < num_tokens:
                words.append((run.words(engine, token_ids)[: num_tokens - run.start], run.start))
                self.runs.append((run.until(num_tokens), shift, run.where))
        for text in texts:
            for run, shift in runs(self.found, text.originals, text.segments):
                words.append((run.words(engine, text.token_ids), text.num_spans_before * SPAN_TOKENS + run.start))
                self.runs.append((run, shift + text.distance, text.spans(run.start, run.end)))
        passages = torch.split(word_numbers(engine, sought.token_ids), PASSAGE_TOKENS)
        beginnings = list(accumulate((text.num_spans for text in texts), initial=self.num_spans_of_tokens))[:-1]
        self.by_words = word_scores(passages, words, self.num_spans, beginnings)

    def scores(self, heads: Sequence[_Head]) -> Tensor:
        """(num_spans,): mean over the heads, of the passage for which it is highest; -inf without a compacted token."""
        lifts = []
        for head in heads:
            passages = torch.arange(len(head.query)) // PASSAGE_TOKENS
            members = torch.nn.functional.one_hot(passages).float().T
            asked = shares_of(head.asked, members / members.sum(dim=1, keepdim=True), self.num_spans)
            lifts.append(lift(asked, head.usual))
        is_compact = torch.zeros(self.num_spans, dtype=torch.bool)
        for segment in self.cache.segments:
            is_compact[segment.start // SPAN_TOKENS : (segment.end - 1) // SPAN_TOKENS + 1] = True
        is_compact[self.num_spans_of_tokens :] = False
        for text in self.texts:
            for segment in text.segments:
                is_compact[text.spans(segment.start, segment.end)] = True
        by_passage = torch.stack(lifts).mean(dim=0) + self.by_words
        return by_passage.amax(dim=0).masked_fill(~is_compact, -torch.inf)

    def head(self, index: int, query: Tensor) -> _Head:
        """The attention of search head `index`; with `is_rough`, that of the text on originals is a first look."""
        layer, kv_head = self._layer(index), self._kv_head(index)
        query = query * (layer.scaling or 0.0)
        usual_query = self._usual(index, self.num_tokens)
        asked, usual = list[Masses](), list[Masses]()
        for run, shift, where in self.runs:
            known = self._usual_of(index, run, shift)
            usual.append(known.masses._replace(where=where))
            spans = run.rough(kv_head) if self.is_rough else run.spans[kv_head]
            masses = spans.masses(layer.rotated(query[None], -shift)[0], where)
            asked.append(masses._replace(scale=masses.scale + (known.rough_loss or 0.0)) if self.is_rough else masses)
        asked += self._on_others(index, query)
        usual += self._on_others(index, usual_query)
        mean = torch.full((1, len(usual_query)), 1 / len(usual_query))
        return _Head(query, asked, shares_of(usual, mean, self.num_spans)[0])

    def look_closely(self, heads: Sequence[_Head], chosen: Tensor) -> None:
        """Replace the first look at some spans by their exact masses.

        Args:
            chosen: rising indices of spans.
        """
        for number, (run, shift, where) in enumerate(self.runs):
            mine = chosen[(chosen >= where.start) & (chosen < where.stop)]
            local = mine - where.start
            spans = [of_head.at(local) for of_head in run.spans] if len(mine) else []
            for index, head in enumerate(heads if spans else ()):
                head.asked[number].sums[:, local] = 0
                query = self._layer(index).rotated(head.query[None], -shift)[0]
                head.asked.append(spans[self._kv_head(index)].masses(query, mine))

    def _layer(self, index: int) -> SessionLayer:
        return self.cache.compactable[self.found.heads[index].layer]

    def _kv_head(self, index: int) -> int:
        return self.found.kv_heads.index(self.found.heads[index][:2])

    def _usual(self, index: int, position: int) -> Tensor:
        """The usual queries of one search head as they are at a position, multiplied by the scale of the scores."""
        usual, layer = self.found.usual[index], self._layer(index)
        if self.can_rotate:
            usual = layer.rotated(usual[None], position - self.found.position)[0].float()
        return usual * (layer.scaling or 0.0)

    def _usual_of(self, index: int, run: Run, shift: int) -> Usual:
        """The attention of the usual queries on a run, which keeps it."""
        distance, kv_head = usual_distance(self.num_tokens - shift - run.start), self._kv_head(index)
        known, query = run.usual(index, distance), self._usual(index, run.start + distance)
        if known is None:
            known = Usual(run.spans[kv_head].masses(query, run.where))
            run.keep_usual(index, distance, known)
        if self.is_rough and known.rough_loss is None:
            rough = run.rough(kv_head).masses(query, run.where)
            known = known._replace(rough_loss=float((known.masses.log_total - rough.log_total).mean()))
            run.keep_usual(index, distance, known)
        return known

    def _on_others(self, index: int, query: Tensor) -> Iterator[Masses]:
        """The masses on slots of tokens without an original, and on the exact tail."""
        _, head, _ = self.found.heads[index]
        layer, start, end = self._layer(index), self.cache.tail_start, self.num_tokens
        if layer.slots is not None:
            slots = layer.slots.head(head)
            positions = slots.positions.long()
            is_found = self._is_without_original[positions.clamp(0, max(end - 1, 0))]
            slots = slots.where(is_found & (positions >= self.cache.num_pinned_slots) & (positions < end))
            if len(slots.positions):
                key, bias = decoded(slots.key).cpu(), slots.bias.float().cpu()
                yield masses_of_slots(query, key, bias, slots.positions.long().cpu())
        if start < end:
            spans = Spans.of(layer.exact_entries(start, end)[0][head].cpu(), start)
            yield spans.masses(query, slice(start // SPAN_TOKENS, self.num_spans_of_tokens))

    @cached_property
    def _is_without_original(self) -> Tensor:
        """(num_tokens,) bool."""
        is_without = torch.ones(max(self.num_tokens, 1), dtype=torch.bool)
        for start, end in kept_spans(self.originals):
            is_without[start:end] = False
        return is_without


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
    room = math.inf if max_tokens is None else (max_tokens - SPAN_TOKENS) // 2  # on each side of a span
    if room < 0:
        return pages
    margin = int(min(room, MARGIN_TOKENS))
    slack = int(min(room - margin, BOUNDARY_TOKENS))
    for span in scores.argsort(descending=True, stable=True).tolist():
        if not scores[span] >= least_score:
            break
        more = joined([*pages, *_around(engine, token_ids, segments, span, margin, slack)])
        if max_tokens is not None and sum(page.num_tokens for page in more) > max_tokens:
            break
        if max_pages is not None and len(more) > max_pages <= len(pages):
            break  # but a span across two segments may be one page too many
        pages = more
    return pages


def page_score(scores: Tensor, page: Page) -> float:
    """The best score of a page's spans."""
    return float(scores[page.start // SPAN_TOKENS : (page.end - 1) // SPAN_TOKENS + 1].max())


def _around(
    engine: Engine, token_ids: Sequence[int], segments: Sequence[Segment], span: int, margin: int, slack: int
) -> Iterator[Page]:
    """A span with its margins, cut at the edges of segments, and ending at boundaries of the text.

    Args:
        margin: tokens on each side.
        slack: how far each end may move to a boundary, in tokens.
    """
    first, last = span * SPAN_TOKENS, (span + 1) * SPAN_TOKENS
    for segment in segments:
        if segment.start < last and segment.end > first:
            edges = (first - margin, last + margin)
            yield Page(*(_boundary(engine, token_ids, segment, edge, slack) for edge in edges))


def _boundary(engine: Engine, token_ids: Sequence[int], segment: Segment, edge: int, slack: int) -> int:
    if not slack or not segment.start < edge < segment.end:
        return min(max(edge, segment.start), segment.end)
    earliest, latest = max(edge - slack, segment.start), min(edge + slack, segment.end)
    return best_boundary(engine, token_ids, max(earliest, 1), min(latest, len(token_ids) - 1))
