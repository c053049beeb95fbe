"""Queries that pass by while a context reads, and that a later compaction or lookup needs, are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from am_memory.recall.search_heads import ready_search_heads
from am_memory.recall.search_queries import HeadSink
from am_memory.session import mounting

if TYPE_CHECKING:
    from am_memory.session.context import Context


def read_and_keep_queries(context: Context, token_ids: Sequence[int], num_logits: int) -> Tensor:
    """Read tokens in one pass (see `Engine.forward`); keep the live queries and those of the search heads.

    Mounted texts that wait for the attention sinks join the cache behind these.
    """
    live, sink, start = context.live, _search_sink(context, len(token_ids)), context.cache.num_tokens

    def on_query(index: int, query: Tensor, log_mass: Tensor) -> None:
        if live is not None:
            live.add(index, query, log_mass)
        if sink is not None:
            sink(index, query, log_mass)

    is_kept = live is not None or sink is not None
    logits = context.engine.forward(
        context.cache, token_ids, num_logits=num_logits, on_query=on_query if is_kept else None
    )
    mounting.settle(context, context.mounts.waiting(start))
    if sink is not None:
        read, before = sink.taken(start), context.recent_queries
        context.recent_queries = read if before is None else before.then(read)
    return logits


def _search_sink(context: Context, num_tokens: int) -> HeadSink | None:
    """Takes the queries that a later lookup needs; None if it needs none, or the engine gives none for free."""
    least = context.engine.capabilities.free_query_tokens
    if least is None or num_tokens < least or not context.recall_tokens or not context.cache.num_tokens:
        return None
    found = ready_search_heads(context.engine, context.cache)
    return None if found is None else HeadSink(found.heads)
