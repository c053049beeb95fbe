"""Mounting in a context: a compact text's slots join the cache, leave it, or are turned to where the context stands.

Each function is a step on its own, with a record, so that a rebuild repeats it. The tokens of the context and their
positions do not change. Does not know where texts come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from am_memory.compaction.plan import max_compact_tokens
from am_memory.compaction.record import MountRecord
from am_memory.errors import InvalidInput, InvalidPolicy, OriginalLost, PromptTooLong
from am_memory.events import TextMounted, TextUnmounted
from am_memory.kv_cache.cache import exchanged, without_mounted
from am_memory.recall.paging import Page, turned
from am_memory.session import pages
from am_memory.session.mounts import Mounted, NamedText

if TYPE_CHECKING:
    from am_memory.session.context import Context
    from am_memory.storage.compact_text import TextCache


def mount(context: Context, text: TextCache) -> None:
    """Mount a text behind the tokens of a context, and compact others to make room.

    A context that has not read its attention sinks yet sees the text once it has: the first tokens must see nothing.

    Raises:
        InvalidInput: a text of that name is mounted already.
        PromptTooLong: it does not fit below the trigger.
    """
    if context.mounts.mounted_as(text.about.name) is not None:
        raise InvalidInput(f"{text.about.name!r} is mounted in session {context.name!r} already: unmount it first")
    context.read_all()
    named = context.mounts.named(text)
    _make_room(context, named)
    context.background_compaction = None  # it does not see the text; a new one starts when it is due
    context.mounts = context.mounts.with_record(_record(context, named, is_there=True), named)
    _insert(context, context.mounts.mounted[-1])
    about = text.about
    context.notify(
        TextMounted(context.name, about.name, context.cache.num_tokens, about.num_tokens, context.cache.kv_tokens)
    )


def unmount(context: Context, name: str) -> None:
    """Take the slots of a mounted text away; raises InvalidInput if no text of that name is mounted."""
    if (mounted := context.mounts.mounted_as(name)) is None:
        names = ", ".join(repr(other.named.name) for other in context.mounts.mounted) or "none"
        raise InvalidInput(f"{name!r} is not mounted in session {context.name!r}; there are: {names}")
    context.read_all()
    context.background_compaction = None  # it sees the text
    _put_pages_away(context, mounted.named)
    context.mounts = context.mounts.with_record(_record(context, mounted.named, is_there=False))
    _remove(context, mounted.named)
    context.notify(TextUnmounted(context.name, name, context.cache.num_tokens, context.cache.kv_tokens))


def size(context: Context) -> float:
    """Slots per KV head that mounted texts take, and the text for which room is made."""
    return context.mounts.size + _size_of_awaited_text(context)


def size_awaited(context: Context) -> float:
    """The part of `size` that is not in the cache yet."""
    waiting = context.mounts.waiting(context.cache.num_tokens)
    return sum(mounted.num_slots for mounted in waiting) + _size_of_awaited_text(context)


def _size_of_awaited_text(context: Context) -> float:
    return context.awaited_text.about.num_slots if context.awaited_text else 0.0


def read_waiting(context: Context, token_ids: Sequence[int]) -> Sequence[int]:
    """Read those of the next tokens that do not see a mounted text yet, if others see it; return the others."""
    num_tokens = context.cache.num_tokens
    seen_from = min((text.record.seen_from for text in context.mounts.waiting(num_tokens)), default=num_tokens)
    if not num_tokens < seen_from < num_tokens + len(token_ids):
        return token_ids
    context.forward(token_ids[: seen_from - num_tokens])
    return read_waiting(context, token_ids[seen_from - num_tokens :])


def settle(context: Context, texts: Iterable[Mounted]) -> None:
    """Insert mounted texts, as far as the tokens are read that do not see them."""
    for mounted in texts:
        _insert(context, mounted)


def move_near(context: Context) -> None:
    """Let mounted texts end where the context stands, if they would leave the context window before long."""
    num_tokens, window = context.cache.num_tokens, context.engine.info.window_tokens
    for named, record in context.mounts.mounted:
        if num_tokens + context.trigger_tokens - (record.seen_from - named.text.num_tokens) > window:
            context.mounts = context.mounts.with_record(_record(context, named, is_there=True))
            _insert(context, context.mounts.mounted[-1])


def repeat(context: Context, record: MountRecord) -> None:
    """Take the next step of a rebuild. A page whose originals are lost stays compact."""
    mounts = context.mounts
    if record.is_of_text and record.is_there:
        context.mounts = mounts.repeated(record)
        _insert(context, context.mounts.mounted[-1])
        return
    if record.is_of_text:
        _remove(context, mounts.holding(record.start))
    elif record.is_there:
        with suppress(OriginalLost):
            pages.bring_back(context, Page(record.start, record.end))
    elif (recalled := pages.recalled_at(context, Page(record.start, record.end))) is not None:
        pages.put_away(context, recalled)
    context.mounts = mounts.repeated(record)


def go_back(context: Context, last_swap: int) -> None:
    """After the cache was cut: mount what was mounted at its new end, with the pages that were exact then.

    Args:
        last_swap: logical tokens in the cache when the last compaction was swapped in.
    """
    before, num_tokens = context.mounts, context.cache.num_tokens
    after = before.without_later(num_tokens, last_swap)
    if after.records == before.records and not after.waiting(num_tokens):
        return
    for mounted in before.mounted:
        _put_pages_away(context, mounted.named)
        _remove(context, mounted.named)
    context.mounts = after
    settle(context, after.mounted)
    for page in after.exact_pages:
        if pages.fit(context, [page]):
            with suppress(OriginalLost):
                pages.bring_back(context, page)
    context.mounts = after


def _make_room(context: Context, named: NamedText) -> None:
    """Compact until the text fits."""
    about = named.text.about
    context.awaited_text = named.text
    try:
        context.require_progress()
        context.compact_if_due()
    except InvalidPolicy as error:
        beside = [
            f"{context.num_pinned} pinned tokens",
            f"{context.policy.keep_recent} recent ones",
            f"{context.mounts.size:.0f} slots of other mounted texts",
            f"up to {max_compact_tokens(context.policy, context.rest_tokens)} of compacted tokens",
            f"{context.recall_tokens} for recall",
        ]
        raise PromptTooLong(
            f"{about.name!r} takes {about.num_slots:.0f} slots, and does not fit below the trigger of "
            f"{context.trigger_tokens} beside {', '.join(beside)}: compact the text to fewer slots (keep_ratio, "
            "max_compact_tokens), unmount another one, or raise trigger_tokens"
        ) from error
    finally:
        context.awaited_text = None


def _insert(context: Context, mounted: Mounted) -> None:
    """Put the slots of a text into the cache, in place of those that are there."""
    named, cache = mounted.named, context.cache
    if cache.num_tokens < mounted.record.seen_from:
        return
    nearer = [
        turned(slots.to(context.engine.info.device), layer, mounted.distance).mounted(named.offset)
        for layer, slots in zip(cache.compactable, named.text.slots, strict=True)
    ]
    cache.restore(exchanged(cache.state(), (named.start, named.end), nearer))


def _remove(context: Context, named: NamedText) -> None:
    context.cache.restore(without_mounted(context.cache.state(), (named.start, named.end)))


def _put_pages_away(context: Context, named: NamedText) -> None:
    for recalled in context.recalled:
        if named.start <= recalled.page.start < named.end:
            pages.put_away(context, recalled)


def _record(context: Context, named: NamedText, *, is_there: bool) -> MountRecord:
    num_tokens, num_compactions = context.cache.num_tokens, len(context.records)
    return MountRecord(
        num_tokens,
        num_compactions,
        named.start,
        named.end,
        is_of_text=True,
        is_there=is_there,
        seen_from=max(num_tokens, context.policy.num_sinks),
    )
