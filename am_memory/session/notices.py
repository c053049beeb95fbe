"""What listeners are told beside the events of each step: progress, a few times a stage, and warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from am_memory.events import CompactionReport, GateMissed, LittleKept, WindowExceeded

if TYPE_CHECKING:
    from am_memory.session.context import Context

LITTLE_KEPT = 0.05
"""Share of the compacted tokens below which a warning says how few slots are left."""

PARTS = 3
"""Progress events of one stage: a listener may show each of them to somebody."""


class Stages:
    """Progress that is worth an event: a stage has come a third further."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, int]] = {}

    def is_further(self, stage: str, done: int, total: int) -> bool:
        """Whether the stage has begun another third since it was last asked about; it may begin again."""
        part, (last_done, last_part) = PARTS * done // max(total, 1), self._last.get(stage, (0, 0))
        goes_on = done > last_done and part >= last_part
        self._last[stage] = done, part
        return part > (last_part if goes_on else 0)


def warn(context: Context, report: CompactionReport, kept_before: float) -> None:
    """Emit the events that are due after a compaction.

    Args:
        kept_before: compact slots per compacted token before the compaction.
    """
    sizes, limit, error = context.sizes, context.policy.max_error, report.held_out_error
    is_meant = context.policy.experiments.fit == "no_slots"
    if sizes.kept_share < LITTLE_KEPT <= kept_before and not is_meant:
        num_tokens = sum(held.num_tokens for held in sizes.segments)
        context.notify(LittleKept(context.name, sizes.compact_slots, num_tokens))
    if limit is not None and error is not None and error > limit:
        context.notify(GateMissed(context.name, report.start, report.end, error, limit))


def warn_beyond_window(context: Context, num_tokens: int) -> None:
    """Emit `WindowExceeded` if the next `num_tokens` are the first beyond the model's context window."""
    before, window = context.cache.num_tokens, context.engine.info.window_tokens
    if before <= window < before + num_tokens:
        context.notify(WindowExceeded(context.name, before + num_tokens, window, context.why_keys_stay))
