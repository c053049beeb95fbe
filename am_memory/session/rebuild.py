"""A context made again of its tokens and its records: the cache that it had, to rounding.

Every step is taken where it was taken: a compaction is made, and swapped in, when the cache held as many tokens as
then, and what was recalled is exact while the same tokens are read. No trigger is asked, so that what comes out depends
on nothing but the record. Read token by token it is the same to the bit; in other chunks it may round otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from am_memory.compaction.record import CompactionRecord
from am_memory.engines.base import in_chunks
from am_memory.queries import LiveQueries

if TYPE_CHECKING:
    from am_memory.session.context import Context


def rebuilt(context: Context, num_tokens: int, num_cached: int) -> Context:
    """Another context of the first `num_tokens` tokens, as this one was when its cache held `num_cached` of them.

    Raises:
        CompactionFailed, StorageError: a compaction cannot be made again.
    """
    fresh = context.emptied(num_tokens)
    done = [made for made in context.records if made.swapped_at <= num_cached]
    policies = [context.policy, *(made.policy for made in done if made.policy is not None)]
    if any("live" in policy.reference_queries for policy in policies):
        fresh.live = LiveQueries()
    is_recalled = any(made.recalls for made in done)
    if is_recalled and context.policy.originals == "drop":  # kept until all of it is read
        fresh.policy = context.policy.with_changes(originals="host")
    with fresh.transaction():
        for made in done:
            _make_again(fresh, made, num_cached)
        fresh.policy = context.policy
        if (begun_at := _begun_at(context, len(done), num_cached)) is not None:
            read_as_it_is(fresh, begun_at)
            fresh.begin()
        read_as_it_is(fresh, num_cached)
    if context.policy.originals == "drop":
        fresh.originals = ()
    return fresh


def _begun_at(context: Context, num_done: int, num_cached: int) -> int | None:
    """When the compaction was begun that was under way; None where there was none."""
    begun = [made.at_tokens for made in context.records[num_done : num_done + 1]]
    if context.background_compaction is not None:
        begun.append(context.background_compaction.at_tokens)
    is_ahead = context.policy.ahead_tokens > 0
    return next((at_tokens for at_tokens in begun if is_ahead and at_tokens <= num_cached), None)


def _make_again(fresh: Context, made: CompactionRecord, num_cached: int) -> None:
    read_as_it_is(fresh, made.at_tokens)
    again = fresh.job(made.plan, fresh.cache, made).run(fresh.progress)
    read_as_it_is(fresh, made.swapped_at)
    fresh.swap_in(again)
    for recall in made.recalls:
        if recall.at_tokens <= num_cached:
            read_as_it_is(fresh, recall.at_tokens)
            fresh.page(recall.start, is_exact=recall.is_exact)


def read_as_it_is(fresh: Context, end: int) -> None:
    """Bring the first `end` tokens into the cache, whatever the trigger says."""
    for chunk in in_chunks(fresh.tokens[fresh.cache.num_tokens : end], fresh.chunk_tokens):
        fresh.forward(chunk)
