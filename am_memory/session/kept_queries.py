"""Queries that pass by while a context reads, and that a later compaction or lookup needs, are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from am_memory.engines.base import OnQuery
from am_memory.recall.search_heads import ready_search_heads
from am_memory.recall.search_queries import HeadSink
from am_memory.session import mounting

if TYPE_CHECKING:
    from am_memory.session.context import Context


class KeptQueries:
    """What one forward pass of a context leaves behind: live queries, those of the search heads, and mounted texts.

    Args:
        context: is about to read.
        num_tokens: tokens of the pass.
    """

    def __init__(self, context: Context, num_tokens: int) -> None:
        self._context, self._start = context, context.cache.num_tokens
        self._search = _search_sink(context, num_tokens)

    @property
    def on_query(self) -> OnQuery | None:
        """For the engine; None if nothing wants the queries."""
        return None if self._context.live is None and self._search is None else self._add

    def _add(self, index: int, query: Tensor, log_mass: Tensor) -> None:
        if self._context.live is not None:
            self._context.live.add(index, query, log_mass)
        if self._search is not None:
            self._search(index, query, log_mass)

    def settle(self) -> None:
        """Keep the queries after the pass. Mounted texts that wait for the attention sinks join the cache."""
        context = self._context
        mounting.settle(context, context.mounts.waiting(self._start))
        if self._search is not None:
            read, before = self._search.taken(self._start), context.recent_queries
            context.recent_queries = read if before is None else before.then(read)


def read_and_keep_queries(context: Context, token_ids: Sequence[int], num_logits: int) -> Tensor:
    """Read tokens in one pass (see `Engine.forward`), and keep the queries that are needed later."""
    kept = KeptQueries(context, len(token_ids))
    logits = context.engine.forward(context.cache, token_ids, num_logits=num_logits, on_query=kept.on_query)
    kept.settle()
    return logits


def _search_sink(context: Context, num_tokens: int) -> HeadSink | None:
    """Takes the queries that a later lookup needs; None if it needs none, or the engine gives none for free."""
    least = context.engine.capabilities.free_query_tokens
    if least is None or num_tokens < least or not context.recall_tokens or not context.cache.num_tokens:
        return None
    found = ready_search_heads(context.engine, context.cache)
    return None if found is None else HeadSink(found.heads)
