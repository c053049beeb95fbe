"""Recall in a context: compacted segments become exact again, from their originals, as long as there is room.

Makes the room and reports what is lost. The context puts recalled segments away again, when a compaction is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from am_memory.errors import BudgetTooSmall, CompactionFailed, InvalidInput, OriginalLost, PromptTooLong
from am_memory.events import OriginalsDropped, OriginalsLost, SpanRecalled
from am_memory.kv_cache.slots import Segment
from am_memory.recall import search as spans
from am_memory.recall.originals import between
from am_memory.recall.paging import Recalled, brought_back
from am_memory.session.context import Context

T = TypeVar("T")


def recall(context: Context, start: int, end: int) -> list[Segment]:
    """Make the segments that hold any of the tokens [start, end) exact, and compact others to make room.

    They stay exact until the trigger or a compaction needs the room; the one recalled first is put away first.

    Returns:
        These segments.

    Raises:
        InvalidInput: their originals were not kept.
        PromptTooLong: they do not fit below the trigger.
    """
    while True:
        wanted = [segment for segment in context.cache.segments if segment.start < end and segment.end > start]
        held = [recalled for recalled in context.recalled if recalled.segment in wanted]
        for recalled in held:
            make_exact(context, recalled.segment.start)
        missing = [segment for segment in wanted if segment not in [recalled.segment for recalled in held]]
        if not missing or _fit(context, missing):
            break
        if len(context.recalled) > len(held):
            context.put_away(context.recalled[0])
        else:
            _compact_to_recall(context, wanted)
    for segment in missing:
        make_exact(context, segment.start)
    return wanted


def make_exact(context: Context, start: int) -> None:
    """Make the segment that begins at `start` exact; if it is exact already, it now counts as recalled last.

    Raises:
        InvalidInput: its originals were not kept, or no segment begins there.
    """
    recalled = recalled_at(context, start) or _brought_back(context, start)
    context.recalled = (*(other for other in context.recalled if other is not recalled), recalled)
    context.record_recall(start, is_exact=True)


def resume_recall(context: Context, start: int) -> None:
    """Make a segment exact that was exact when the session was saved.

    Without its originals, or room for it, it stays compact.
    """
    segment = _segment_at(context, start)
    if segment is None:
        return
    if _fit(context, [segment]):
        with suppress(InvalidInput):
            context.recalled = (*context.recalled, _brought_back(context, start))
            return
    context.record_recall(start, is_exact=False)


def recalled_at(context: Context, start: int) -> Recalled | None:
    """The recalled segment that begins at `start`."""
    return next((recalled for recalled in context.recalled if recalled.segment.start == start), None)


def search(context: Context, text: str, span_tokens: int) -> list[spans.Span]:
    """All compacted tokens, in spans of about `span_tokens`, each with its score for a text."""
    context.read_all()
    return _with_originals(
        context,
        lambda: spans.search(
            context.engine,
            context.cache,
            context.tokens,
            context.originals,
            text,
            span_tokens=span_tokens,
            chunk_tokens=context.chunk_tokens,
        ),
    )


def forget_lost_originals(context: Context) -> None:
    """Go on without the originals that turned out to be lost, or were dropped, and emit an event for each."""
    for original in [original for original in context.originals if original.lost is not None]:
        context.originals = tuple(other for other in context.originals if other is not original)
        event = OriginalsDropped if original.is_dropped else OriginalsLost
        context.notify(event(context.name, original.start, original.end, original.lost or ""))


def _with_originals(context: Context, use: Callable[[], T]) -> T:
    """Call `use`, which reads originals. When it finds one lost, forget that one and call it again."""
    while True:
        forget_lost_originals(context)
        with suppress(OriginalLost):
            return use()


def _segment_at(context: Context, start: int) -> Segment | None:
    return next((segment for segment in context.cache.segments if segment.start == start), None)


def _brought_back(context: Context, start: int) -> Recalled:
    """Make the compact segment that begins at `start` exact in the cache."""
    segment = _segment_at(context, start)
    if segment is None:
        raise InvalidInput(f"no segment begins at token {start}: there are {context.cache.segments}")
    entries = _with_originals(context, lambda: between(context.originals, segment.start, segment.end))
    if entries is None:
        raise InvalidInput(
            f"tokens {segment.start} to {segment.end} cannot be recalled: their originals were not kept when they "
            "were compacted, or are lost; set the policy's originals to 'host' or 'disk' before that, and the memory's "
            "originals_bytes and originals_disk_bytes to what all of them take"
        )
    layers = zip(context.cache.compactable, entries, strict=True)
    entries = [(layer.rotated(key, segment.shift), value) for layer, (key, value) in layers]
    state, recalled = brought_back(context.cache.state(), segment, entries)
    context.cache.restore(state)
    context.notify(SpanRecalled(context.name, segment.start, segment.end, context.cache.kv_tokens))
    return recalled


def _fit(context: Context, segments: Sequence[Segment]) -> bool:
    """Whether the cache stays below the size at which a compaction begins if these compact segments become exact."""
    cache = context.cache
    growth = sum(segment.num_tokens - segment.num_slots / cache.num_heads for segment in segments)
    return cache.kv_tokens + growth + 1 <= context.start_tokens


def _compact_to_recall(context: Context, wanted: Sequence[Segment]) -> None:
    """Compact once more, to make room for these segments; raises PromptTooLong if that cannot be enough."""
    num_tokens = sum(segment.num_tokens for segment in wanted)
    too_long = PromptTooLong(
        f"the {num_tokens} tokens of the segments to recall do not fit below the trigger of {context.trigger_tokens} "
        "beside what else is held: recall a shorter span, or raise trigger_tokens"
    )
    if context.num_pinned + num_tokens + context.policy.keep_recent >= context.start_tokens:
        raise too_long
    try:
        context.compact()
    except (CompactionFailed, BudgetTooSmall) as error:
        raise too_long from error
