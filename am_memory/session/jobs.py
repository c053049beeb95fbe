"""The jobs of a context's compactions: a new one, or one that is repeated. Does not know when one is due."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from am_memory.budgets import calibration_for
from am_memory.compaction.job import BlockJob, CompactionJob
from am_memory.compaction.plan import Plan, plan_block, segment_ends
from am_memory.compaction.record import CompactionRecord
from am_memory.engines.base import SessionCache
from am_memory.events import CompactionStarted

if TYPE_CHECKING:
    from am_memory.session.context import Context


def next_compaction(context: Context, cache: SessionCache, fraction: float | None = None) -> BlockJob:
    """Emit `CompactionStarted`, and describe the compaction of the oldest exact tokens.

    Args:
        cache: the context's, or a fork of it.
        fraction: of the cache, as `Context.compact` has it.

    Raises:
        CompactionFailed: there is nothing to compact.
        BudgetTooSmall: a head would get fewer than `min_slots`.
    """
    ends = segment_ends(context.policy, context.sizes, fraction, context.boundary)
    plans = plan_block(context.policy, context.sizes, context.rest_tokens, ends)
    return _begun(context, [_job(context, plan, cache) for plan in plans])


def repeated_compaction(context: Context, cache: SessionCache, records: Sequence[CompactionRecord]) -> BlockJob:
    """The same for a compaction of which there are records, under the policy of that time."""
    return _begun(context, [_job(context, record.plan, cache, record) for record in records])


def _begun(context: Context, jobs: Sequence[CompactionJob]) -> BlockJob:
    first, last = jobs[0].plan.newest, jobs[-1].plan.newest
    context.notify(CompactionStarted(context.name, first.start, last.end, jobs[0].cache.kv_tokens))
    return BlockJob(tuple(jobs))


def _job(context: Context, plan: Plan, cache: SessionCache, replayed: CompactionRecord | None = None) -> CompactionJob:
    """The compaction of one segment."""
    segment, policy, calibration, live_start = plan.newest, context.policy, context.calibration, 0
    if replayed is not None:
        live_start = replayed.live_start
        if replayed.policy is not None:
            policy, calibration = replayed.policy, calibration_for(replayed.policy.head_budget, context.engine.info)
    start, live = max(segment.start, cache.tail_start), context.live
    return CompactionJob(
        engine=context.engine,
        policy=policy,
        cache=cache,
        tokens=context.tokens[: segment.end],
        plan=plan,
        start=start,
        num_pinned=context.num_pinned,
        trigger_tokens=context.rest_tokens,
        originals=context.originals_place,
        original_store=context.original_store,
        weights=context.history.token_weights(policy.tool_result_weight, start, segment.end),
        live=live.since(live_start) if live and "live" in (policy.reference_queries or ()) else None,
        calibration=calibration,
        replayed=replayed,
    )
