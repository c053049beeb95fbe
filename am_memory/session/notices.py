"""What listeners are told beside the events of each step: progress, a few times a stage, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from am_memory.events import GateMissed, LittleKept, WindowExceeded

if TYPE_CHECKING:
    from am_memory.compaction.job import CompactionResult
    from am_memory.session.context import Context

LITTLE_KEPT = 0.05
"""Share of the compacted tokens below which a warning says how few slots are left."""

PARTS = 3
"""Progress events of one stage: a listener may show each of them to somebody."""


class Stages:
    """Progress that is worth an event: a stage has come a third further."""

    def __init__(self) -> None:
        self._stage, self._done, self._part = "", 0, 0

    def is_further(self, stage: str, done: int, total: int) -> bool:
        """Whether the stage has begun another third since the last call; the same stage may begin again."""
        part = PARTS * done // max(total, 1)
        goes_on = stage == self._stage and done > self._done
        is_further = part > (self._part if goes_on else 0)
        self._stage, self._done, self._part = stage, done, part
        return is_further


def warn(context: Context, result: CompactionResult, kept_before: float) -> None:
    """Emit the events that are due.

    Args:
        kept_before: compact slots per compacted token before the compaction.
    """
    sizes, segment, limit = context.sizes, result.record.plan.newest, context.policy.max_error
    is_meant = context.policy.experiments.fit == "no_slots"
    if sizes.kept_share < LITTLE_KEPT <= kept_before and not is_meant:
        num_tokens = sum(held.num_tokens for held in sizes.segments)
        context.notify(LittleKept(context.name, sizes.compact_slots, num_tokens))
    if limit is not None and result.held_out_error is not None and result.held_out_error > limit:
        context.notify(GateMissed(context.name, segment.start, segment.end, result.held_out_error, limit))


def warn_beyond_window(context: Context, num_tokens: int) -> None:
    """Emit `WindowExceeded` if the next `num_tokens` are the first beyond the model's context window."""
    before, window = context.cache.num_tokens, context.engine.info.window_tokens
    if before <= window < before + num_tokens:
        context.notify(WindowExceeded(context.name, before + num_tokens, window, context.why_keys_stay))
