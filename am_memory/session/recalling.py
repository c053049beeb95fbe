"""Recall in a context: compacted tokens become exact again, from their originals, as long as there is room.

Makes the room and reports what is lost. `lookup.py` finds which tokens to recall; the context puts pages away again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from am_memory.errors import BudgetTooSmall, CompactionFailed, InvalidInput, OriginalLost, PromptTooLong, is_whole
from am_memory.events import OriginalsDropped, OriginalsLost, Span
from am_memory.kv_cache.slots import Segment
from am_memory.recall.paging import Page, joined
from am_memory.session import pages
from am_memory.session.context import Context

T = TypeVar("T")


def ends_of(span: object) -> tuple[int, int]:
    """The first token of a span, and the one after its last; raises InvalidInput for what is no span."""
    ends = (span.start, span.end) if isinstance(span, Page | Segment | Span) else span
    if not (isinstance(ends, tuple) and len(ends) == 2 and all(map(is_whole, ends))):
        raise InvalidInput(
            f"{span!r} is not a span: give one of `segments`, a result of `search`, or (start, end) in tokens"
        )
    return ends


def recall_of_tokens(context: Context, start: int, end: int) -> list[Page]:
    """`recall`, for tokens of the conversation; raises InvalidInput for others."""
    if not 0 <= start < end <= len(context.tokens):
        raise InvalidInput(
            f"there is nothing to recall between tokens {start} and {end}: give a span within the "
            f"{len(context.tokens)} tokens of the session"
        )
    return recall(context, start, end)


def recall_of_text(context: Context, name: str, start: int, end: int) -> list[Page]:
    """`recall`, for tokens of a mounted text, which count from 0; raises InvalidInput for others."""
    mounted = context.mounts.mounted_as(name)
    if mounted is None or not 0 <= start < end <= mounted.named.text.num_tokens:
        raise InvalidInput(
            f"there is nothing to recall between tokens {start} and {end} of the text {name!r}: mount it, and give a "
            "span within it"
        )
    context.read_all()
    if context.cache.num_tokens < mounted.record.seen_from:
        raise InvalidInput(
            f"the text {name!r} is seen once {mounted.record.seen_from} tokens are read, and there are "
            f"{context.cache.num_tokens}: append more first"
        )
    first = mounted.named.start
    found = recall(context, first + start, first + end)
    return [Page(page.start - first, page.end - first) for page in found]


def recall(context: Context, start: int, end: int) -> list[Page]:
    """Make the compacted tokens among [start, end) exact, and compact others to make room.

    They stay exact until others need the room; the page recalled first is put away first.

    Returns:
        The pages that are exact now and hold any of these tokens, in the order of the tokens.

    Raises:
        InvalidInput: their originals were not kept.
        PromptTooLong: they do not fit below the trigger.
    """
    while True:
        held = [recalled.page for recalled in context.recalled]
        around = joined([*held, *_compact_pages(context, start, end)])
        wanted = [page for page in around if page.start < end and page.end > start]
        missing = [page for page in wanted if page not in held]
        for page in missing:  # before any room is made for it
            if not pages.are_kept(context, page):
                raise _not_kept(page)
        if pages.fit(context, missing):
            break
        if others := [recalled for recalled in context.recalled if recalled.page not in wanted]:
            pages.put_away(context, others[0])
        else:
            _compact_to_recall(context, wanted)
    pages.put_away_all_but(context, around)
    for page in wanted:
        make_exact(context, page)
    return wanted


def recall_pages(context: Context, found: Sequence[Page], max_tokens: int) -> None:
    """Make pages exact within a bound; the pages recalled last stay exact beside them.

    A page whose originals are lost stays compact.

    Args:
        found: in the order of their tokens, no two overlapping, and within `max_tokens` together.
        max_tokens: upper bound on the tokens of all exact pages.
    """
    kept = list(found)
    for recalled in reversed(context.recalled):
        more = joined([*kept, recalled.page])
        if sum(page.num_tokens for page in more) <= max_tokens:
            kept = more
    pages.put_away_all_but(context, kept)
    for page in kept:
        if pages.recalled_at(context, page) is None:
            with_originals(context, partial(pages.bring_back, context, page))


def make_exact(context: Context, page: Page) -> None:
    """Make a page exact; if it is exact already, it now counts as recalled last.

    Raises:
        InvalidInput: its originals were not kept, or no segment holds it.
    """
    if not with_originals(context, lambda: pages.bring_back(context, page)):
        raise _not_kept(page)


def resume_recall(context: Context, page: Page, *, is_recorded: bool) -> None:
    """Make a page exact that was exact when the session was saved.

    Without its originals, or room for it, it stays compact.

    Args:
        is_recorded: the records say that it is exact, so that nothing is added to them.
    """
    is_held = any(page.is_within(segment.start, segment.end) for segment in context.cache.segments)
    if not (is_held or context.mounts.has(page)):
        return
    if pages.fit(context, [page]):
        before, steps = context.records, context.mounts.records
        with suppress(InvalidInput):
            make_exact(context, page)
            if is_recorded:
                context.records, context.mounts = before, replace(context.mounts, records=steps)
            return
    if is_recorded:
        pages.record_recall(context, page, is_exact=False)


def forget_lost_originals(context: Context) -> None:
    """Go on without the originals that turned out to be lost, or were dropped, and emit an event for each."""
    for original in [original for original in context.originals if original.lost is not None]:
        context.originals = tuple(other for other in context.originals if other is not original)
        event = OriginalsDropped if original.is_dropped else OriginalsLost
        context.notify(event(context.name, original.start, original.end, original.lost or ""))
    for named in context.mounts.texts:
        for original in [original for original in named.text.originals if original.lost is not None]:
            context.mounts = context.mounts.without_lost()
            start, end = original.start - named.text.start, original.end - named.text.start
            reason = f"of the mounted text {named.name!r}: {original.lost}"
            context.notify(OriginalsLost(context.name, start, end, reason))


def with_originals(context: Context, use: Callable[[], T]) -> T:
    """Call `use`, which reads originals. When it finds one lost, forget that one and call it again."""
    while True:
        forget_lost_originals(context)
        with suppress(OriginalLost):
            return use()


def _compact_pages(context: Context, start: int, end: int) -> list[Page]:
    """The compacted tokens among [start, end), one page for each segment."""
    of_texts = (segment for mounted in context.mounts.mounted for segment in mounted.named.segments)
    segments = [one for one in (*of_texts, *context.cache.segments) if one.start < end and one.end > start]
    return [Page(max(segment.start, start), min(segment.end, end)) for segment in segments]


def _not_kept(page: Page) -> InvalidInput:
    return InvalidInput(
        f"tokens {page.start} to {page.end} cannot be recalled: their originals were not kept when they were "
        "compacted, or are lost; set the policy's originals to 'host' or 'disk' before that, and the memory's "
        "originals_bytes and originals_disk_bytes to what all of them take"
    )


def _compact_to_recall(context: Context, wanted: Sequence[Page]) -> None:
    """Compact once more, to make room for these pages; raises PromptTooLong if that cannot be enough."""
    num_tokens = sum(page.num_tokens for page in wanted)
    too_long = PromptTooLong(
        f"the {num_tokens} tokens to recall do not fit below the trigger of {context.trigger_tokens} beside what else "
        "is held: recall a shorter span, or raise trigger_tokens"
    )
    if context.num_fixed + num_tokens + context.policy.keep_recent >= context.trigger_tokens:
        raise too_long
    try:
        context.compact()
    except (CompactionFailed, BudgetTooSmall) as error:
        raise too_long from error
