"""Going back: a context forgets its last tokens. Where a compaction has seen them, the cache is rebuilt.

A cache that cannot drop tokens goes back to a checkpoint, and reads the few tokens from there on.

A rebuild repeats every step at the position at which it was taken, from the tokens and the records alone: compactions
begin and are swapped in when the cache holds as many tokens as then, segments are refined where they were, and what was
recalled is exact for the same tokens. No trigger is asked. Read token by token the cache is the same to the bit; in
other chunks it may round differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest

from am_memory.compaction.record import CompactionRecord, RefinementRecord, Step, by_compaction
from am_memory.engines.base import in_chunks
from am_memory.events import SessionRebuilt
from am_memory.queries import LiveQueries
from am_memory.recall.paging import Page
from am_memory.session import checkpoints, mounting
from am_memory.session.context import Context
from am_memory.session.jobs import repeated_compaction
from am_memory.session.mounts import Mounts
from am_memory.session.pages import bring_back, exact_pages, fit, put_away, put_away_all_but, recalled_at, record_recall
from am_memory.session.recalling import make_exact, with_originals
from am_memory.session.refining import repeat_refinement


def rewind(context: Context, num_tokens: int) -> None:
    """Forget all tokens after the first `num_tokens`; rebuild the cache if it cannot simply be cut."""
    if not can_truncate(context, num_tokens):
        seen = "a compaction has seen the tokens to forget"
        lost = "the tokens to forget are compacted, in a sliding window, or in a recurrent state"
        rebuild(context, num_tokens, seen if _began_compaction_after(context, num_tokens) else lost)
        return
    num_cached = _num_cached(context, num_tokens)
    _drop_after(context, num_cached)
    # A compaction that was swapped in later but saw none of the forgotten tokens stays: a rebuild repeats it.
    pairs = zip_longest(context.records, context.records[1:])
    context.records = [_without_later_recalls(*pair, num_cached).within(num_cached) for pair in pairs]
    context.tokens = context.tokens[:num_tokens]
    _restore_pages(context)
    mounting.go_back(context, context.records[-1].swapped_at if context.records else 0)
    running = context.background_compaction
    context.forget_after_cache()
    read_untriggered(context, num_cached)
    if running is not None and running.at_tokens <= num_cached:  # it has seen the same tokens as are read again
        context.background_compaction = running


def _drop_after(context: Context, num_cached: int) -> None:
    """Forget all but the first `num_cached` tokens of the cache, and a few of these where it cannot drop tokens."""
    cache = context.cache
    if num_cached == cache.num_tokens or cache.is_croppable:
        cache.truncate(num_cached)
    elif (checkpoint := checkpoints.last_before(context, num_cached)) is not None:
        cache.restore(checkpoint.applied(cache.state()))


def _without_later_recalls(
    record: CompactionRecord, following: CompactionRecord | None, num_cached: int
) -> CompactionRecord:
    """A record without recalls for forgotten tokens; those that belong to a swap-in stay."""
    last = max(num_cached, (following or record).swapped_at)
    return replace(record, recalls=tuple(recall for recall in record.recalls if recall.at_tokens <= last))


def _restore_pages(context: Context) -> None:
    """Make exactly those pages exact that the records say, as far as they fit and their originals are there."""
    recorded, of_texts = context.records, context.mounts.exact_pages
    wanted = exact_pages(recorded[-1].recalls) if recorded else []
    put_away_all_but(context, [*wanted, *of_texts])
    for page in wanted:
        if recalled_at(context, page) is None and fit(context, [page]):
            with_originals(context, partial(bring_back, context, page))
    context.records = recorded
    for page in wanted:
        if recalled_at(context, page) is None:
            record_recall(context, page, is_exact=False)
    in_order = [*of_texts, *wanted]
    context.recalled = tuple(sorted(context.recalled, key=lambda recalled: in_order.index(recalled.page)))


def can_truncate(context: Context, num_tokens: int) -> bool:
    """Whether the tokens after the first `num_tokens` are exact, were seen by no compaction, and can be dropped.

    A cache that cannot drop them may have a checkpoint to go back to.
    """
    cache, num_cached = context.cache, _num_cached(context, num_tokens)
    can_drop = cache.is_croppable or checkpoints.last_before(context, num_cached) is not None
    is_cut = num_cached == cache.num_tokens or (num_cached >= cache.tail_start and can_drop)
    return is_cut and not _began_compaction_after(context, num_tokens)


def compacted_after(context: Context, num_tokens: int) -> bool:
    """Whether a compaction was swapped in when the cache held more than the first `num_tokens` tokens."""
    return any(record.swapped_at > _num_cached(context, num_tokens) for record in context.records[-1:])


def _began_compaction_after(context: Context, num_tokens: int) -> bool:
    """Whether a compaction began when the cache held more than the first `num_tokens` tokens.

    Its queries came from behind all of them: without the later tokens it would have been another compaction.
    """
    return any(record.at_tokens > _num_cached(context, num_tokens) for record in context.records[-1:])


def _num_cached(context: Context, num_tokens: int) -> int:
    """How many of the first `num_tokens` tokens the cache holds, if the last of them is left to read."""
    return max(min(context.cache.num_tokens, num_tokens - 1), 0)


def rebuild(context: Context, num_tokens: int, reason: str) -> None:
    """Read the first `num_tokens` tokens again, as far as they were read, with every step that was taken among them.

    Raises:
        CompactionFailed: a compaction cannot be repeated.
    """
    context.notify(SessionRebuilt(context.name, num_tokens, reason))
    fresh = _rebuilt(context, num_tokens, _num_cached(context, num_tokens))
    context.cache.restore(fresh.cache.state())
    context.tokens, context.records, context.originals = fresh.tokens, fresh.records, fresh.originals
    context.recalled, context.background_compaction = fresh.recalled, fresh.background_compaction
    context.recent_queries, context.mounts, context.checkpoints = fresh.recent_queries, fresh.mounts, ()
    context.live = fresh.live if context.live is not None else None


def _rebuilt(context: Context, num_tokens: int, num_cached: int) -> Context:
    """Another context of the first `num_tokens` tokens, as this one was when its cache held `num_cached` of them."""
    fresh = _unread(context, num_tokens)
    done = [record for record in context.records if record.swapped_at <= num_cached]
    policies = [context.policy, *(record.policy for record in done if record.policy is not None)]
    if any("live" in (policy.reference_queries or ()) for policy in policies):
        fresh.live = LiveQueries()
    needs_originals = any(record.recalls or record.refinements for record in done)
    if needs_originals and context.originals_place == "drop":  # kept only for the steps that are repeated
        fresh.originals_place = "host"
    if needs_originals:  # neither a recall nor a refinement can be repeated without them
        fresh.original_store = context.original_store.without_drops()
    with fresh.transaction():
        steps: tuple[Step, ...] = ()
        for records in by_compaction(done):
            _repeat(fresh, steps, records)
            steps = tuple(step for step in records[-1].steps if step.at_tokens <= num_cached)
        fresh.originals_place, fresh.original_store = context.originals_place, context.original_store
        if (began_at := _background_start(context, len(done), num_cached)) is not None:
            steps = _repeat_steps(fresh, steps, began_at)
            read_untriggered(fresh, began_at)
            fresh.start_background_compaction()
        _repeat_steps(fresh, steps, num_cached)
        read_untriggered(fresh, num_cached)
    fresh.mounts = fresh.mounts.finished()
    if context.originals_place == "drop":
        fresh.originals = ()
    context.original_store.adopt(fresh.originals)
    return fresh


def _unread(context: Context, num_tokens: int) -> Context:
    """A context of the first `num_tokens` tokens that has read none of them."""
    return Context(
        context.name,
        context.engine,
        context.policy,
        context.notify,
        context.engine.new_cache(),
        context.original_store,
        context.tokens[:num_tokens],
        num_pinned=context.num_pinned,
        history=context.history,
        mounts=Mounts(context.mounts.texts, to_repeat=context.mounts.records),
    )


def _background_start(context: Context, num_done: int, num_cached: int) -> int | None:
    """Tokens in the cache when the compaction began that ran in the background; None if there was none."""
    starts = [record.at_tokens for record in context.records[num_done : num_done + 1]]
    if context.background_compaction is not None:
        starts.append(context.background_compaction.at_tokens)
    is_ahead = context.policy.ahead_tokens > 0
    return next((at_tokens for at_tokens in starts if is_ahead and at_tokens <= num_cached), None)


def _repeat(fresh: Context, steps: Sequence[Step], records: Sequence[CompactionRecord]) -> None:
    """Repeat a compaction, and the steps since the one before; some of them came while it ran in the background.

    Args:
        records: of its segments.
    """
    at_tokens, swapped_at = records[0].at_tokens, records[0].swapped_at
    later = _repeat_steps(fresh, steps, at_tokens)
    read_untriggered(fresh, at_tokens)
    results = repeated_compaction(fresh, fresh.fork_at_rest(), records).run(fresh.progress)
    _repeat_steps(fresh, later, swapped_at)
    read_untriggered(fresh, swapped_at)
    fresh.swap_in(results)


def _repeat_steps(fresh: Context, steps: Sequence[Step], end: int) -> tuple[Step, ...]:
    """Repeat the steps that came when the cache held at most `end` tokens; return the others."""
    for step in steps:
        if step.at_tokens <= end:
            read_untriggered(fresh, step.at_tokens)
            _repeat_step(fresh, step)
    return tuple(step for step in steps if step.at_tokens > end)


def _repeat_step(fresh: Context, step: Step) -> None:
    """Refine a segment, recall a page, or put one away."""
    if isinstance(step, RefinementRecord):
        repeat_refinement(fresh, step)
        return
    page = Page(step.start, step.end)
    if step.is_exact:
        make_exact(fresh, page)
    elif (recalled := recalled_at(fresh, page)) is not None:
        put_away(fresh, recalled)


def read_untriggered(fresh: Context, end: int) -> None:
    """Read the first `end` tokens into the cache, whatever the trigger says, and repeat what was mounted meanwhile."""
    while (record := fresh.mounts.due(len(fresh.records), end)) is not None:
        _read(fresh, record.at_tokens)
        mounting.repeat(fresh, record)
    _read(fresh, end)


def _read(fresh: Context, end: int) -> None:
    for chunk in in_chunks(fresh.tokens[fresh.cache.num_tokens : end], fresh.chunk_tokens):
        fresh.forward(chunk)
