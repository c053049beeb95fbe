"""The saved branches of all threads, in the memory's store. Needs no device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from am_memory.conversations.branch import Branch, BranchMetadata
from am_memory.errors import StorageError
from am_memory.memory import Memory
from am_memory.session.saving import saved_copy
from am_memory.storage.session_file import SavedSession

MAX_OPENED = 8
"""Saved branches of a thread that are loaded when the thread is first used."""
MAX_THREADS = 10_000
"""Threads of which it is remembered that their saved branches were loaded."""

logger = logging.getLogger("am_memory")


@dataclass(eq=False)
class PendingCall:
    """A call in progress. Deleting its thread marks it, so that it keeps nothing."""

    thread: str
    is_deleted: bool = False


@dataclass(frozen=True)
class SavedBranches:
    """Saved branches of a thread that a call may go on from, by name. They do not count once the thread is deleted."""

    call: PendingCall
    sessions: tuple[tuple[str, SavedSession], ...] = ()


class BranchStore:
    """The saved branches of all threads; none without a store."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._opened: dict[str, None] = {}  # threads whose branches were loaded, the earliest first
        self._lock = Lock()

    def _all_names(self) -> list[str]:
        return self._memory.store.names() if self._memory.store is not None else []

    def threads(self) -> set[str]:
        return {name.rpartition("/")[0] for name in self._all_names() if "/" in name}

    def names(self, thread: str) -> list[str]:
        return [name for name in self._all_names() if name.rpartition("/")[0] == thread]

    def find(self, call: PendingCall, keys: Sequence[str], known: Collection[str]) -> SavedBranches:
        """Load the branches that a conversation may go on from.

        The longest one that the conversation begins with is found by its name. The others are loaded once for each
        thread, up to `MAX_OPENED`.

        Args:
            keys: of the conversation.
            known: names of branches that are in memory.
        """
        if self._memory.store is None:
            return SavedBranches(call)
        names = [name for name in self.names(call.thread) if name not in known]
        count_of = {key: count for count, key in enumerate(keys)}
        beginnings = [name for name in names if _last_key(name) in count_of]
        wanted = sorted(beginnings, key=lambda name: count_of[_last_key(name)])[-1:]
        with self._lock:
            if call.thread not in self._opened:
                self._opened[call.thread] = None
                wanted += [name for name in names if name not in wanted][:MAX_OPENED]
            while len(self._opened) > MAX_THREADS:
                del self._opened[next(iter(self._opened))]
        return self.load(call, wanted)

    def load(self, call: PendingCall, names: Iterable[str]) -> SavedBranches:
        """Load these branches; one that cannot be read is logged and left out."""
        sessions = []
        for name in names:
            try:
                sessions.append((name, self._memory.load(name)))
            except StorageError as error:  # of another model, damaged, or gone: the conversation is read again
                logger.warning("%s", error)
        return SavedBranches(call, tuple(sessions))

    def was_deleted_elsewhere(self, parent: Branch) -> bool:
        """Whether another process has deleted a saved branch, with all that went on from it.

        A process that goes on from a branch saves the longer one before it deletes the shorter one.
        """
        store = self._memory.store
        if (
            store is None
            or not (parent.was_saved or saved_copy(parent.session).is_deleted)
            or store.exists(parent.name)
        ):
            return False
        looked_at: list[str] = []
        while looked_at != (names := self.names(parent.thread)):  # what was deleted meanwhile has left a longer one
            if any(parent.is_prefix_of(metadata) for metadata in self._metadata(parent.thread, names)):
                return False
            looked_at = names
        return True

    def _metadata(self, thread: str, names: Iterable[str]) -> Iterator[BranchMetadata]:
        """The metadata of saved branches, one at a time; those that cannot be read are left out."""
        for name in names:
            for _, saved in self.load(PendingCall(thread), [name]).sessions:
                with suppress(ValueError):
                    yield BranchMetadata.of(name, saved)


def _last_key(name: str) -> str:
    return name.rpartition("/")[2]
