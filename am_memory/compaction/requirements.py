"""Checks what a policy needs against what an engine can do. Knows no engine."""

from __future__ import annotations

from am_memory.engines.base import Capabilities
from am_memory.errors import InvalidPolicy, UnsupportedOperation
from am_memory.policy import MemoryPolicy

WHY_NOT_REFINED = (
    "needs a cache that can be put together as it was before a compaction; sliding windows, recurrent states, and "
    "heads that share every cell, cannot"
)


def require_refinable(can: Capabilities) -> None:
    """Raise UnsupportedOperation if no segment can be refined."""
    if not can.can_refine:
        raise UnsupportedOperation(f"refining {WHY_NOT_REFINED}: compact with more queries instead (reference_queries)")


def require_capabilities(policy: MemoryPolicy, can: Capabilities) -> None:
    """Check a policy against an engine's capabilities.

    Raises:
        InvalidPolicy: it asks for more.
    """
    wishes = (
        (
            policy.head_budget not in ("auto", "uniform"),
            can.has_ragged_heads,
            f"head_budget {policy.head_budget!r} needs a cache whose heads can differ in their slots; this engine's "
            "heads share every cell: leave it at 'auto'",
        ),
        (
            policy.originals in ("host", "disk"),
            can.can_exchange_slots,
            f"originals {policy.originals!r} needs a cache that exact entries can come back into; this "
            "engine's heads share every cell: leave it at 'auto'",
        ),
        (
            policy.refine == "idle",
            can.can_refine and can.can_read_in_parallel,
            f"refine 'idle' {WHY_NOT_REFINED}: leave it at 'off'",
        ),
        (
            policy.segment_dtype != "model",
            can.can_hold_int8,
            f"segment_dtype {policy.segment_dtype!r} needs a cache whose slots may have another type than exact "
            "tokens; this engine's heads share every cell: leave it at 'model', and give llama.cpp kv_type='q8_0'",
        ),
        (
            policy.experiments.on_policy,
            can.can_compact_layerwise,
            "experiments.on_policy needs a cache whose layers can be compacted one by one in the middle of a pass; "
            "this engine's heads share every cell: leave it at False",
        ),
        (
            policy.experiments.summary_tokens is not None,
            can.can_rotate_keys,
            f"experiments.summary_tokens {policy.experiments.summary_tokens} needs keys that can be rotated to where "
            f"the block stood: {can.why_keys_stay}; leave it at None",
        ),
        (
            policy.ahead_tokens > 0,
            can.can_read_in_parallel,
            f"ahead_tokens {policy.ahead_tokens} needs an engine that reads into two caches at once, which this one "
            "cannot: leave it at 0",
        ),
    )
    for is_asked, is_possible, problem in wishes:
        if is_asked and not is_possible:
            raise InvalidPolicy(problem)
