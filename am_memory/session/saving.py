"""A session as it is saved, and back; and the copy in the store that it may overwrite.

`Session.save` is two steps in one call. A scheduler takes them one by one: `pack` (needs the engine, and is short) and
`write` (waits for the store, and needs no engine).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from am_memory.compaction.record import as_policy, with_policy
from am_memory.errors import OriginalLost, SessionDeleted
from am_memory.events import OriginalsLost
from am_memory.kv_cache.cache import without_mounted
from am_memory.policy import MemoryPolicy
from am_memory.recall.paging import Page
from am_memory.session import mounting
from am_memory.session.chat_history import ChatHistory
from am_memory.session.context import Context
from am_memory.session.mounts import Mounts, NamedText
from am_memory.session.pages import exact_pages, put_away, recalled_at
from am_memory.session.rebuild import read_untriggered
from am_memory.session.recalling import forget_lost_originals, resume_recall
from am_memory.session.resuming import load
from am_memory.session.shared import Shared
from am_memory.storage.session_file import SavedSession, packed
from am_memory.storage.store import ANY

if TYPE_CHECKING:
    from am_memory.session.session import Session


@dataclass
class SavedCopy:
    """The copy in the store that a session may overwrite, as far as the session knows.

    Attributes:
        version: what the session was read from or last saved as; None: nothing; `ANY`: whatever is there.
        in_doubt: the version of the last save, which an interrupt may have stopped before or after it was written.
        is_deleted: the memory has deleted the session; saving it would bring it back.
    """

    version: str | None = None
    in_doubt: str | None = None
    is_deleted: bool = False

    @property
    def was_saved(self) -> bool:
        """Whether the session was in the store at some time."""
        return self.version not in (None, ANY)

    def begin_save(self, version: str) -> None:
        """Note the version that a save is about to write: an interrupt may hide whether it was written."""
        self.in_doubt = version


@dataclass(frozen=True)
class Packed:
    """A session ready to be written: its content, and the bytes of its file."""

    saved: SavedSession
    data: bytes


def saved_copy(session: Session) -> SavedCopy:
    """The copy in the store that the session may overwrite."""
    return session._saved_copy


def rename(session: Session, name: str) -> None:
    """Give a session another name, for events and the store. Under its own name it keeps its saved copy."""
    if name != session.name:
        session._context.name = name
        session._saved_copy = SavedCopy()


def snapshot(session: Session) -> SavedSession:
    """Everything that a session is, as it would be saved. It shares the session's memory: for reading only.

    It is taken between two steps, and waits for the one that runs in another thread.
    """
    with session._shared.engine_lock:
        return _snapshot(session)


def _snapshot(session: Session) -> SavedSession:
    context, info = session._context, session.engine.info
    return SavedSession(
        fingerprint=info.fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        template_fingerprint=info.template_fingerprint,
        model_name=info.name,
        policy=context.policy.model_dump(mode="json"),
        has_own_policy=session._has_own_policy,
        tokens=tuple(context.tokens),
        records=tuple(context.records),
        messages=context.history.messages,
        message_starts=context.history.starts,
        is_answering=context.history.is_answering,
        tools=context.history.tools,
        metadata=session.metadata,
        num_pinned=context.num_pinned,
        state=without_mounted(context.state_at_rest),
        originals=context.originals,
        recalled=tuple(recalled.page for recalled in context.recalled),
        search_queries=context.recent_queries,
        texts=tuple((named.start, named.text.without_lost()) for named in context.mounts.texts),
        mount_records=context.mounts.records,
    )


def pack(session: Session) -> Packed:
    """The session as it is now, ready for `write`; the session may go on meanwhile.

    Raises:
        StorageError: a message or the metadata holds something that JSON cannot.
    """
    with session._shared.engine_lock:
        forget_lost_originals(session._context)
        saved = snapshot(session)
        return Packed(saved, packed(saved))


def write(session: Session, what: Packed, *, overwrite: bool = False) -> None:
    """Write a packed session to the store, whole or not at all. This may take long, and needs no engine.

    Args:
        overwrite: replace the saved session of that name, even if this one did not go on from it.

    Raises:
        SessionChanged: another session was saved under this name meanwhile.
        SessionDeleted: the session was deleted meanwhile.
        StorageError: the memory has no store, or the store cannot be written to.
    """
    while True:
        with suppress(OriginalLost):
            _write_once(session, what, overwrite)
            return
        what = pack(session)  # without the originals that turned out to be lost


def _write_once(session: Session, what: Packed, overwrite: bool) -> None:
    with session._shared.store_lock:
        copy, store = session._saved_copy, session._shared.require_store()
        if copy.is_deleted and not overwrite:
            raise SessionDeleted(
                f"session {session.name!r} was deleted, so it is not saved: to keep it after all, give it a name with "
                "Memory.keep(session, NAME), or save it with overwrite=True"
            )
        copy.version = store.save(
            session.name,
            what.saved,
            replaces=ANY if overwrite else copy.version,
            in_doubt=copy.in_doubt,
            on_version=copy.begin_save,
            data=what.data,
        )


def restored(shared: Shared, name: str, saved: SavedSession, policy: MemoryPolicy, *, trusts_messages: bool) -> Context:
    """The conversation of a saved session, as it was when it was saved.

    Args:
        policy: how it goes on.
        trusts_messages: read control tokens in messages as control tokens.

    Raises:
        InvalidPolicy: it cannot go on under this policy.
        CorruptSession: its cache cannot be one of this model's.
    """
    cache = shared.engine.new_cache()
    load(name, saved, cache)
    mounts = Mounts(tuple(NamedText(text, start) for start, text in saved.texts), saved.mount_records)
    is_same = saved.policy == policy.model_dump(mode="json")
    context = Context(
        name,
        shared.engine,
        policy,
        shared.notify,
        cache,
        shared.original_store,
        tokens=list(saved.tokens),
        records=list(saved.records) if is_same else with_policy(as_policy(saved.policy), saved.records),
        num_pinned=saved.num_pinned,
        history=ChatHistory(
            saved.messages, saved.message_starts, saved.is_answering, saved.tools, trusts_messages=trusts_messages
        ),
        originals=saved.originals,
        mounts=mounts.resumed(cache.num_tokens),
    )
    mounting.settle(context, context.mounts.mounted)
    context.recent_queries = saved.search_queries and saved.search_queries.until(cache.num_tokens)
    for original, reason in saved.lost:
        shared.notify(OriginalsLost(name, original.start, original.end, reason))
    _resume_pages(context, saved, is_same=is_same)
    return context


def _resume_pages(context: Context, saved: SavedSession, *, is_same: bool) -> None:
    """Make the pages exact that were exact when the session was saved.

    The saved cache is the one from which a background compaction started. What was recalled since then is recalled
    again at its place, among the tokens that were read meanwhile.

    Args:
        is_same: the policy is the saved one, so that this compaction starts again.
    """
    num_cached, recalls = context.cache.num_tokens, context.records[-1].recalls if context.records else ()
    earlier = tuple(recall for recall in recalls if recall.at_tokens <= num_cached)
    later = recalls[len(earlier) :]
    if later:
        context.records[-1] = replace(context.records[-1], recalls=earlier)
    of_texts = context.mounts
    if not (later or of_texts.to_repeat) or not is_same or not context.policy.ahead_tokens:
        context.mounts = of_texts.finished()
        recorded = [*exact_pages(earlier), *context.mounts.exact_pages]
        for page in saved.recalled:
            resume_recall(context, page, is_recorded=page in recorded)
        return
    with context.transaction():
        for page in (*exact_pages(earlier), *of_texts.exact_pages):
            resume_recall(context, page, is_recorded=True)
        context.start_background_compaction()
        for recall in later:
            read_untriggered(context, recall.at_tokens)
            page = Page(recall.start, recall.end)
            if recall.is_exact:
                resume_recall(context, page, is_recorded=False)
            elif (held := recalled_at(context, page)) is not None:
                put_away(context, held)
        for record in context.mounts.to_repeat[-1:]:
            read_untriggered(context, record.at_tokens)
