"""The part of a memory that its sessions need: one engine, one store, one lock for each, and the sessions' names."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import TYPE_CHECKING
from weakref import WeakSet

from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput, StorageError
from am_memory.events import Listener
from am_memory.kv_cache.cache import Snapshot
from am_memory.recall.original_store import OriginalStore
from am_memory.session.compact_texts import CompactTexts
from am_memory.session.idle import IdleWorker
from am_memory.storage.store import Store
from am_memory.text.sampling import Sampling

if TYPE_CHECKING:
    from am_memory.session.generation import Generation
    from am_memory.session.session import Session

BESIDE_SHARE = 0.25
"""Share of a chunk that is read of a prompt in one pass, while answers wait for their next tokens."""


@dataclass(eq=False)
class Shared:
    """Everything that the sessions of one memory share.

    Attributes:
        engine: runs the model.
        sampling: how tokens are chosen where a call does not say.
        store: where sessions are saved; None: nowhere.
        notify: called with every event.
        original_store: holds the exact entries of compacted tokens, within its bounds.
        texts: the compact texts.
        sessions: the named sessions that are in memory.
        idle_worker: refines the segments of these sessions while none of them works.
        engine_lock: held while a session works. No code waits for the store while it holds this lock; only originals
            are read from a local folder.
        writing: answers that are generated together.
        store_lock: held while a session is saved or deleted. It is never held together with `engine_lock`.
    """

    engine: Engine
    sampling: Sampling
    store: Store | None
    notify: Listener
    original_store: OriginalStore
    texts: CompactTexts
    sessions: dict[str, Session] = field(default_factory=dict)
    engine_lock: RLock = field(default_factory=RLock)
    writing: WeakSet[Generation] = field(default_factory=WeakSet)
    store_lock: RLock = field(default_factory=RLock)
    idle_worker: IdleWorker = field(init=False)

    def __post_init__(self) -> None:
        self.idle_worker = IdleWorker(self)

    @cached_property
    def cache_of_one_token(self) -> Snapshot:
        """A cache of this model, to compare the layers of saved caches with; whoever reads it holds `engine_lock`."""
        cache = self.engine.new_cache()
        self.engine.forward(cache, [0])
        return cache.state()

    def pass_tokens(self, chunk_tokens: int) -> int:
        """Tokens of a prompt to read in one pass: a part of a chunk while answers wait for their next tokens."""
        is_awaited = any(not answer.is_finished for answer in self.writing)
        return max(int(chunk_tokens * BESIDE_SHARE), 1) if is_awaited else chunk_tokens

    def names(self) -> list[str]:
        """All named sessions, in memory and in the store."""
        stored = self.store.names() if self.store is not None else []
        return sorted({*self.sessions, *stored})

    def add(self, session: Session) -> None:
        """Keep a session under its own name.

        Raises:
            InvalidInput: the name is taken.
        """
        if session.name in self.names():
            raise InvalidInput(f"there is a session {session.name!r} already: choose another name, or delete it first")
        self.keep(session, session.name)

    def keep(self, session: Session, name: str) -> None:
        """Keep a session under a name, in place of the one that has it."""
        self.sessions[name] = session
        self.idle_worker.ask(name)

    def require_store(self) -> Store:
        """The store.

        Raises:
            StorageError: there is none.
        """
        if self.store is None:
            raise StorageError("this memory has no store: make it with Memory(..., store=FOLDER_OR_URL)")
        return self.store
