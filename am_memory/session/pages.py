"""The pages of a context: one becomes exact, one gets its slots back, and the records say when.

Each function is a step on its own. Does not know which pages are worth it, nor whether there is room.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from am_memory.compaction.plan import most_at_once
from am_memory.compaction.record import MountRecord, RecallRecord
from am_memory.errors import InvalidInput, OriginalLost
from am_memory.events import SpanPutAway, SpanRecalled
from am_memory.recall import originals, paging
from am_memory.recall.originals import KeysAndValues, between
from am_memory.recall.paging import Page, Recalled

if TYPE_CHECKING:
    from am_memory.session.context import Context


def bring_back(context: Context, page: Page) -> bool:
    """Make a page exact; it counts as recalled last. False: originals of its tokens were not kept.

    Raises:
        InvalidInput: no segment holds it.
        OriginalLost: originals turned out to be lost.
    """
    cache, recalled = context.cache, recalled_at(context, page)
    if recalled is None:
        shift, entries = _of_mounted_text(context, page) if page.start < 0 else _of_tokens(context, page)
        if entries is None:
            return False
        layers = zip(cache.compactable, entries, strict=True)
        turned = [(layer.rotated(key, shift), value) for layer, (key, value) in layers]
        of_texts = (segment for mounted in context.mounts.mounted for segment in mounted.named.segments)
        is_whole = any((one.start, one.end) == page for one in (*cache.segments, *of_texts))
        state, recalled = paging.brought_back(cache.state(), page, turned, is_whole=is_whole)
        cache.restore(state)
        context.notify(SpanRecalled(context.name, page.start, page.end, cache.kv_tokens))
    context.recalled = (*(other for other in context.recalled if other is not recalled), recalled)
    record_recall(context, page, is_exact=True)
    return True


def bring_back_all(context: Context, held: Sequence[Page]) -> None:
    """Make pages exact again, as far as there is room; one whose originals are lost stays compact."""
    for page in held:
        if fit(context, [page]):
            with suppress(OriginalLost):
                bring_back(context, page)


def are_kept(context: Context, page: Page) -> bool:
    """Whether the originals of a page's tokens are there, as far as is known without reading them."""
    if page.start >= 0:
        return originals.are_kept(context.originals, page.start, page.end)
    named = context.mounts.holding(page.start)
    return originals.are_kept(named.text.originals, page.start - named.offset, page.end - named.offset)


def put_away(context: Context, recalled: Recalled) -> None:
    """Make a recalled page compact again, with the slots that it had before."""
    page = recalled.page
    context.cache.restore(paging.put_away(context.cache.state(), recalled))
    context.notify(SpanPutAway(context.name, page.start, page.end, context.cache.kv_tokens))
    context.recalled = tuple(other for other in context.recalled if other is not recalled)
    record_recall(context, page, is_exact=False)


def put_away_all_but(context: Context, kept: Collection[Page]) -> None:
    """Make all recalled pages compact again, except for some."""
    for recalled in context.recalled:
        if recalled.page not in kept:
            put_away(context, recalled)


def put_all_away(context: Context) -> list[Page]:
    """Make all recalled pages compact again; returns them, the one recalled first at the start."""
    held = [recalled.page for recalled in context.recalled]
    while context.recalled:
        put_away(context, context.recalled[0])
    return held


def recalled_at(context: Context, page: Page) -> Recalled | None:
    """The recalled page of exactly these tokens."""
    return next((recalled for recalled in context.recalled if recalled.page == page), None)


def exact_pages(recalls: Iterable[RecallRecord]) -> list[Page]:
    """The pages that are exact after these recalls, the one recalled last at the end."""
    exact: list[Page] = []
    for recall in recalls:
        page = Page(recall.start, recall.end)
        exact = [*(other for other in exact if other != page), *([page] if recall.is_exact else [])]
    return exact


def fit(context: Context, compact: Sequence[Page]) -> bool:
    """Whether the cache stays below the trigger if these compact pages become exact."""
    growth = sum(_growth(context, page) for page in compact)
    return context.cache.kv_tokens + growth + 1 <= context.trigger_tokens


def _growth(context: Context, page: Page) -> float:
    """Tokens (mean over heads) by which the cache grows if a page becomes exact as a whole."""
    slots = [layer.slots for layer in context.cache.compactable if layer.slots is not None]
    num_slots = sum(held.within(page.start, page.end).num_slots for held in slots)
    return page.num_tokens - num_slots / max(context.cache.num_heads, 1)


def make_room(context: Context, num_tokens: int = 1) -> None:
    """Compact until pages of `recall_tokens` and some more tokens fit.

    Nothing happens where nothing can be recalled: when compactions come then depends on the tokens alone.

    Args:
        num_tokens: of the tokens that come next; as many of them as a compaction can always make room for.
    """
    if num_tokens > 1:
        num_tokens = min(num_tokens, most_at_once(context.policy, context.rest_tokens, context.num_fixed))
    while is_room_kept(context) and context.tokens_at_rest + num_tokens > context.rest_tokens:
        context.compact()


def is_room_kept(context: Context) -> bool:
    """Whether anything can be recalled, so that room for it is kept while an answer is written."""
    return context.recall_tokens > 0 and bool(context.cache.segments or context.mounts.mounted)


def record_recall(context: Context, page: Page, *, is_exact: bool) -> None:
    """Record that the tokens read from now on see a page exact, or compact."""
    num_tokens, num_compactions = context.cache.num_tokens, len(context.records)
    if page.start < 0:
        record = MountRecord(num_tokens, num_compactions, *page, is_of_text=False, is_there=is_exact)
        context.mounts = context.mounts.with_record(record)
        return
    *before, last = context.records
    recall = RecallRecord(num_tokens, page.start, page.end, is_exact)
    context.records = [*before, replace(last, recalls=(*last.recalls, recall))]


def _of_tokens(context: Context, page: Page) -> tuple[int, list[KeysAndValues] | None]:
    """By how many positions the keys of a page were rotated since they were written; and its original entries."""
    for segment in context.cache.segments:
        if page.is_within(segment.start, segment.end):
            return segment.shift, between(context.originals, page.start, page.end)
    raise InvalidInput(f"no segment holds the tokens {page.start} to {page.end}: there are {context.cache.segments}")


def _of_mounted_text(context: Context, page: Page) -> tuple[int, list[KeysAndValues] | None]:
    """The same for a page of a mounted text."""
    for mounted in context.mounts.mounted:
        named, distance = mounted.named, mounted.distance
        for segment in named.segments:
            if page.is_within(segment.start, segment.end):
                start, end = page.start - named.offset, page.end - named.offset
                return distance + segment.shift, between(named.text.originals, start, end)
    raise InvalidInput(f"no mounted text holds the tokens that are named {page.start} to {page.end}")
