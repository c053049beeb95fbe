"""The inside of sessions and memories, for tests: what is private there is named here and in no other file of tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from am_memory import Memory, Session
from am_memory.compaction.background import BackgroundCompaction
from am_memory.compaction.record import CompactionRecord
from am_memory.kv_cache.slots import Slots
from am_memory.recall.originals import Original
from am_memory.session import pages
from am_memory.session.chat_history import ChatHistory
from am_memory.session.context import Context
from am_memory.session.rebuild import rebuild as rebuild_context
from am_memory.session.shared import Shared
from am_memory.storage.folder import Folder
from am_memory.storage.store import Store

if TYPE_CHECKING:
    from am_memory.engines.llama_cpp import LlamaCppEngine
    from am_memory.engines.llama_cpp.decoder import Decoder
    from am_memory.engines.transformers import TransformersEngine


def context_of(session: Session) -> Context:
    """The tokens of a session, its cache, and the records of its compactions."""
    return session._context


def history_of(session: Session) -> ChatHistory:
    """The messages of a session."""
    return session._context.history


def shared_of(memory: Memory) -> Shared:
    """What the sessions of a memory share: the engine and the store with their locks, and the names."""
    return memory._shared


def cache_of(session: Session) -> Any:
    """The cache of a session, of whichever engine."""
    return context_of(session).cache


def state_of(session: Session) -> Any:
    """All that the cache holds, as it is saved and restored."""
    return cache_of(session).state()


def layers_of(session: Session) -> Any:
    """The layers that can be compacted; without those that slide or recur."""
    return cache_of(session).compactable


def slots_of(session: Session) -> list[Slots]:
    """The compact slots of each of `layers_of`."""
    return [layer.slots for layer in layers_of(session)]


def records_of(session: Session) -> list[CompactionRecord]:
    """What is kept of each compaction, to make it again."""
    return context_of(session).records


def originals_of(session: Session) -> tuple[Original, ...]:
    """The exact entries of compacted tokens, where the policy keeps them."""
    return context_of(session).originals


def pending_of(session: Session) -> BackgroundCompaction | None:
    """The compaction that is under way in the background."""
    return context_of(session).background_compaction


def trigger_of(session: Session) -> int:
    """The size in tokens at which a session is compacted."""
    return context_of(session).trigger_tokens


def rebuild(session: Session) -> None:
    """Read all tokens again, with the compactions that were made."""
    rebuild_context(context_of(session), len(session.tokens), "a test")


def put_away_oldest(session: Session) -> None:
    """Take the page that was recalled first back to its slots."""
    context = context_of(session)
    pages.put_away(context, context.recalled[0])


def folder_of(store: Store) -> Folder:
    """The files of a store."""
    return store._folder


def graphs_of(engine: TransformersEngine) -> Any:
    """The CUDA graphs by which an engine decodes."""
    return engine._graphs


def decoder_of(llama: LlamaCppEngine) -> Decoder:
    """The context of llama.cpp and its sequence, of an engine of shared heads."""
    return llama._reader._model.decoder
