"""Refining in a context: compact segments get better slots, made from their originals.

Says which segment is next, describes its refinement and swaps the result in, with a record of it. Does not know when
nobody waits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from am_memory.budgets import calibration_for
from am_memory.compaction.plan import completed
from am_memory.compaction.record import RefinementRecord
from am_memory.compaction.refinement import Refinement, RefinementResult, refining
from am_memory.events import SegmentRefined
from am_memory.kv_cache.cache import without_mounted
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment
from am_memory.recall.originals import are_kept
from am_memory.recall.paging import at_rest, slots_of, with_new_slots
from am_memory.session import pages
from am_memory.session.context import Context
from am_memory.session.recalling import with_originals

LITTLE_CUT = 0.75
"""A segment that was cut to less than this share of its slots is fitted again: those cut away had a part in its fit."""

MOST_LATER_TOKENS = 512
"""At most so many tokens behind a segment are read again for its refinement."""


def refine_next(context: Context) -> SegmentRefined | None:
    """Refine the segment that gains most; None if none is left."""
    if context.background_compaction is not None:
        context.compact()  # else it would have begun before the refinement, and be swapped in after it
    return with_originals(context, lambda: _refine_next(context))


def _refine_next(context: Context) -> SegmentRefined | None:
    if (segment := next_segment(context)) is None:
        return None
    planned = plan_refinement(context, segment)
    return swap_in(context, planned, planned.run(context.progress))


def repeat_refinement(context: Context, record: RefinementRecord) -> None:
    """Make a recorded refinement again."""
    segment = next(held for held in context.cache.segments if (held.start, held.end) == (record.start, record.end))
    planned = plan_refinement(context, segment, record)
    with_originals(context, lambda: swap_in(context, planned, planned.run(context.progress), record))


def next_segment(context: Context) -> Segment | None:
    """The segment to refine next: the one with most tokens for each slot, the newest of several; None: none is left."""
    left = [segment for segment in context.cache.segments if _can_gain(context, segment)]
    return max(left, key=lambda segment: (segment.num_tokens / segment.num_slots, segment.start), default=None)


def _can_gain(context: Context, segment: Segment) -> bool:
    """Whether a segment can be fitted again, to other queries, or to a smaller number of slots, than it was."""
    if not context.engine.capabilities.can_refine or not are_kept(context.originals, segment.start, segment.end):
        return False
    fitted, wanted = _last_fit(context, segment), set(context.policy.refine_queries)
    if _seen_until(context, segment) == segment.end:
        wanted.discard("live")
    if fitted is None or segment.num_slots == 0 or not wanted:
        return False
    num_slots, queries = fitted
    return not queries.issuperset(wanted) or segment.num_slots < LITTLE_CUT * num_slots


def _last_fit(context: Context, segment: Segment) -> tuple[int, set[str]] | None:
    """The number of slots that a segment was last fitted in, and the queries; None: it must stay as it was made."""
    fitted: tuple[int, set[str]] | None = None
    for record in context.records:
        newest = record.plan.newest
        if _ends(newest) == _ends(segment):
            if record.plan.is_refit or record.summary is not None:  # it stands for more, or less, than its originals
                return None
            policy = completed(record.policy or context.policy, context.engine)
            fitted = newest.num_slots, set(policy.reference_queries or ())
        for one in record.refinements:
            if (one.start, one.end) == _ends(segment):
                fitted = one.num_slots, set((one.policy or context.policy).refine_queries)
    return fitted


def _seen_until(context: Context, segment: Segment) -> int:
    """The tokens that the segment's compaction had seen: who goes back behind them makes the segment anew."""
    seen = (record.at_tokens for record in context.records if _ends(record.plan.newest) == _ends(segment))
    return next(seen, segment.end)


def _ends(segment: Segment) -> tuple[int, int]:
    return segment.start, segment.end


def plan_refinement(context: Context, segment: Segment, record: RefinementRecord | None = None) -> Refinement:
    """Describe the refinement of a segment. This is quick; to run it is not, and needs no context.

    Args:
        record: of the refinement to make again, under the policy of that time; None: this is a new one.
    """
    policy = refining(context.policy if record is None or record.policy is None else record.policy)
    return Refinement(
        engine=context.engine,
        policy=policy,
        state=without_mounted(at_rest(context.cache.state(), context.recalled)),
        segment=segment,
        tokens=context.tokens[: segment.end],
        later_tokens=context.tokens[segment.end : min(_seen_until(context, segment), segment.end + MOST_LATER_TOKENS)],
        originals=context.originals,
        weights=context.history.token_weights(policy.tool_result_weight, segment.start, segment.end),
        calibration=calibration_for(policy.head_budget, context.engine.info),
        conversations=() if record is None else record.conversations,
    )


def is_current(context: Context, planned: Refinement) -> bool:
    """Whether the entries that a refinement was fitted to are still those of the context's tokens."""
    state = at_rest(context.cache.state(), context.recalled)
    layers = zip(slots_of(state), slots_of(planned.state), strict=True)
    return state.segments == planned.state.segments and all(
        torch.equal(decoded(one), decoded(other))
        for mine, theirs in layers
        for one, other in zip(mine.fields, theirs.fields, strict=True)
    )


def swap_in(
    context: Context, planned: Refinement, result: RefinementResult, repeated: RefinementRecord | None = None
) -> SegmentRefined:
    """Give a segment its new slots, and record it. Recalled pages stay exact, as far as there is room for them.

    Args:
        repeated: the record of a refinement that is made again. Later recalls are then repeated as they were.
    """
    cache, segment = context.cache, planned.segment
    state, context.recalled = with_new_slots(cache.state(), context.recalled, _ends(segment), result.slots)
    cache.restore(state)
    policy = None if repeated is None else repeated.policy
    record = RefinementRecord(cache.num_tokens, *_ends(segment), segment.num_slots, result.conversations, policy)
    *before, last = context.records
    context.records = [*before, replace(last, refinements=(*last.refinements, record))]
    while repeated is None and context.recalled and cache.kv_tokens > context.trigger_tokens:
        pages.put_away(context, context.recalled[0])  # the page has fewer of the new slots than it had of the old
    event = SegmentRefined(
        context.name,
        segment.start,
        segment.end,
        segment.num_slots / cache.num_heads,
        result.error_before,
        result.error_after,
        result.seconds,
    )
    context.notify(event)
    return event
