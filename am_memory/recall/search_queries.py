"""The queries of a model's search heads for some tokens: kept when these are read, or taken by reading on scratch.

Does not know what is searched for, nor which of the tokens count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.queries import scratch
from am_memory.recall.search_heads import SearchHead

MESSAGE_TOKENS = 128
"""The most tokens of a message, its last ones, that are looked up, and whose queries are kept."""


class HeadSink:
    """An `OnQuery` that keeps the queries of the search heads, and no others.

    Args:
        heads: the search heads.
    """

    def __init__(self, heads: Sequence[SearchHead]) -> None:
        self._heads = heads
        self._queries: dict[SearchHead, Tensor] = {}

    def __call__(self, index: int, query: Tensor, log_mass: Tensor) -> None:
        for head in self._heads:
            if head.layer == index:
                self._queries[head] = query[head.head, head.group].clone()

    def taken(self, start: int) -> SearchQueries:
        """The queries of the last pass, whose first token stood at logical position `start`."""
        return SearchQueries(tuple(self._heads), start, torch.stack([self._queries[head] for head in self._heads]))


@dataclass(frozen=True, eq=False)
class SearchQueries:
    """The queries of the search heads for consecutive tokens.

    Attributes:
        heads: the search heads.
        start: the logical position of the first token.
        queries: (num_search_heads, num_tokens, head_dim), after RoPE, on the model's device.
    """

    heads: tuple[SearchHead, ...]
    start: int
    queries: Tensor

    @property
    def end(self) -> int:
        return self.start + self.queries.shape[1]

    def then(self, later: SearchQueries) -> SearchQueries:
        """These and those of the tokens right behind, the last `MESSAGE_TOKENS`; the later ones alone after a gap."""
        both = later
        if later.start == self.end and later.heads == self.heads:
            both = replace(self, queries=torch.cat([self.queries, later.queries], dim=1))
        first = max(both.end - MESSAGE_TOKENS, both.start)
        return replace(both, start=first, queries=both.queries[:, first - both.start :])

    def until(self, end: int) -> SearchQueries | None:
        """Those of the tokens before `end`; None if there are none."""
        return replace(self, queries=self.queries[:, : end - self.start]) if end > self.start else None

    def at(self, positions: Sequence[int]) -> Tensor:
        """Those of some of the tokens: (num_search_heads, len(positions), head_dim) float32 on the CPU."""
        return self.queries.cpu().float()[:, torch.tensor(positions) - self.start]


def read_on_scratch(
    engine: Engine, cache: SessionCache, heads: Sequence[SearchHead], token_ids: Sequence[int], chunk_tokens: int
) -> SearchQueries:
    """Read tokens behind what a cache holds, and take their queries.

    Args:
        cache: restored afterwards.
        token_ids: those to read.
    """
    sink, passes, start = HeadSink(heads), list[Tensor](), cache.num_tokens
    with scratch(cache):
        for chunk in in_chunks(token_ids, chunk_tokens):
            engine.forward(cache, chunk, on_query=sink)
            passes.append(sink.taken(start).queries)
    return SearchQueries(tuple(heads), start, torch.cat(passes, dim=1))
