"""Conversations as chat applications send them: whole, at every call. Only what is new is read.

Each call brings all messages so far. `Threads` finds the kept branch that begins with the same ones, goes on in a fork
of it, and keeps the fork once the answer is complete: a failed, cancelled or repeated call leaves nothing behind.
Messages are the truth; a thread's name only says what is saved, evicted and deleted together. Branches share memory
until they differ. Knows nothing of LangChain or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from threading import RLock
from typing import Annotated
from weakref import WeakSet

from pydantic import BaseModel, Field

from am_memory.conversations.prompts import Asked, key_of, last_common_cut, last_cuts, next_key, num_shared
from am_memory.conversations.tool_calls import prepare
from am_memory.engines.base import Message
from am_memory.errors import InvalidInput, SessionDeleted, SessionNotFound, StorageError, require_room
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Encoded, Packed, Session
from am_memory.storage.session_file import SavedSession
from am_memory.storage.store import ANY

MAX_BYTES = 4 * 2**30
MAX_BRANCHES = 64
MAX_OPENED = 8
"""Saved branches of a thread that are read when it is first called for."""
SHORT_CHARS = 16_384
"""Of a conversation that is rendered and encoded in some milliseconds."""
MAX_THREADS = 10_000
"""Of which it is known that their saved branches have been looked at."""
METADATA_KEY = "am_memory.branch"

logger = logging.getLogger("am_memory")


@dataclass
class Branch:
    """One conversation that is kept.

    Attributes:
        thread: what it belongs to.
        keys: a digest of policy and tools, then for each message one of it and all before.
        ends: tokens of the session after each of these; None where it cannot be cut.
    """

    session: Session
    thread: str
    keys: tuple[str, ...]
    ends: tuple[int | None, ...]

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """For each number of entries, the last place up to there at which it can be cut."""
        return last_cuts(self.ends)

    def num_shared(self, asked: Asked) -> int:
        """How many of the first entries are the conversation's too, to the last place where both can be cut."""
        return last_common_cut(self.cuts, asked.cuts, num_shared(self.keys, asked.keys))

    def end_of(self, count: int) -> int:
        """Tokens of the first `count` entries, where `num_shared` allows the cut."""
        end = self.ends[count - 1]
        assert end is not None
        return end

    def is_exact_at(self, count: int) -> bool:
        """Whether it can go on from there without reading anything again; if not, from no place before either."""
        return self.session.can_rewind(self.end_of(count))

    @property
    def was_saved(self) -> bool:
        """Whether it lay in the store at some time."""
        return self.session.saved_version not in (None, ANY)

    def is_extended_by(self, other: Branch | Kept) -> bool:
        """Whether its conversation is the beginning of the other's."""
        is_longer = self.thread == other.thread and len(other.keys) > len(self.keys)
        return is_longer and other.keys[len(self.keys) - 1] == self.keys[-1]


class Kept(BaseModel):
    """What is saved with a branch."""

    thread: str
    keys: Annotated[tuple[str, ...], Field(min_length=1)]
    ends: tuple[Annotated[int, Field(ge=0)] | None, ...]

    @classmethod
    def of(cls, name: str, saved: SavedSession) -> Kept:
        """Raises ValueError where it cannot be that of this branch."""
        kept = cls.model_validate(saved.metadata.get(METADATA_KEY))
        ends = [end for end in kept.ends if end is not None]
        is_in_order = ends == sorted(ends) and ends[-1:] == [len(saved.tokens)]
        if f"{kept.thread}/{kept.keys[-1]}" != name or len(kept.keys) != len(kept.ends) or not is_in_order:
            raise ValueError("what is saved with it is of another one")
        return kept


@dataclass(eq=False)
class Call:
    """Something under way, from before it looks for anything: whoever deletes a thread tells all that are of it."""

    thread: str
    is_deleted: bool = False


@dataclass(frozen=True)
class Saved:
    """Saved branches of a thread, by their names; nothing any more once the thread is deleted."""

    call: Call
    sessions: tuple[tuple[str, SavedSession], ...] = ()


@dataclass(frozen=True)
class Found:
    """A conversation that something is asked about, and what lies in the store that it may go on from."""

    asked: Asked
    saved: Saved


@dataclass
class Turn:
    """One call: a session that is told the prompt, and is kept when `keep` is called.

    Attributes:
        session: a scratch branch of its own, to `generate` with.
        num_cached_tokens: of the conversation, how many were not read in this call.
        rebuilt: why tokens that a branch had read were read again; None where they were not.
    """

    session: Session
    num_cached_tokens: int
    rebuilt: str | None
    _threads: Threads = field(repr=False)
    _parent: Branch | None = field(repr=False)
    _call: Call = field(repr=False)
    _asked: Asked = field(repr=False)
    _ends: tuple[int | None, ...] = field(repr=False)
    _encoded: Encoded | None = field(default=None, repr=False)
    _is_told: bool = field(default=False, repr=False)
    _kept: Unsaved | None = field(default=None, repr=False)

    @property
    def _num_known(self) -> int:
        """How many of the messages, as the chat template takes them, the session holds."""
        num_known = self._asked.num_prepared[len(self._ends) - 1]
        assert num_known is not None, "both can be cut here"
        return num_known

    @property
    def is_short(self) -> bool:
        """Whether `encode` takes no longer than a step on the device."""
        return self._asked.num_chars <= SHORT_CHARS

    def encode(self) -> None:
        """What the session has still to be told, as tokens. Needs no device, and may take long.

        Raises:
            InvalidInput: messages that the model's chat template does not take.
        """
        if news := self._asked.prepared[self._num_known :]:
            self._encoded = self.session.encode(news)

    def tell(self) -> None:
        """Tell the session what was encoded.

        Raises:
            PromptTooLong: what the policy pins leaves no room for anything else.
        """
        if self._encoded is not None:
            self.session.tell(self._encoded)
        self._ends = (*self._ends, *self._new_ends())
        self._encoded, self._is_told = None, True

    def _new_ends(self) -> Iterator[int | None]:
        """Tokens after each of the messages that were told; None where nothing says so."""
        asked = self._asked
        news = len(asked.prepared) - self._num_known
        starts = (*self.session.message_starts[-news:],) if news else ()
        for count in range(len(self._ends), len(asked.num_prepared)):
            num_told = asked.num_prepared[count]
            if num_told is None:
                yield None
            elif num_told == len(asked.prepared):
                yield len(self.session.tokens)
            else:
                before, start = starts[num_told - self._num_known - 1 :][:2]
                yield start if start > before else None  # messages whose tokens cannot be told apart start as one

    def read(self) -> Iterator[int]:
        """Read the prompt, one chunk after another; gives the number of tokens that are left after each.

        Raises:
            PromptTooLong: as `tell`, which is done before if it was not.
            CompactionFailed: a compaction on the way failed.
        """
        if not self._is_told:
            self.tell()
        left = 1
        while left:
            left = self.session.read(self.session.chunk_tokens)
            yield left

    def keep(self, answer: Message) -> None:
        """Keep the conversation with the model's answer, as the application will send it back.

        Nothing is kept of a thread that was deleted since the turn began.

        Raises:
            StorageError: it cannot be saved; it is kept in memory all the same.
        """
        self.take(answer)
        self.save()

    def take(self, answer: Message) -> None:
        """`keep` it in memory, and pack what is to be saved."""
        told = self._asked.keys
        keys, ends = (*told, next_key(told[-1], key_of(answer))), (*self._ends, len(self.session.tokens))
        self._kept = self._threads._take(Branch(self.session, self._call.thread, keys, ends), self._parent, self._call)

    def save(self) -> None:
        """Save what was taken, and let go what it takes the place of. Needs no device, and may take long."""
        if self._kept is not None:
            self._threads._save(self._kept)


@dataclass(frozen=True)
class Unsaved:
    """A branch that is kept in memory, and still to be saved."""

    branch: Branch
    parent: Branch | None
    call: Call
    packed: Packed | StorageError | None


class Threads:
    """The branches of all threads, on one memory.

    Args:
        memory: with a store, every kept branch is saved, and found again by another process.
        max_bytes: of all branches' caches together, shared memory counted for each; the ones not used for longest go
            first, and come back from the store if there is one.
        max_branches: kept in memory.
    """

    def __init__(self, memory: Memory, *, max_bytes: int = MAX_BYTES, max_branches: int = MAX_BRANCHES) -> None:
        require_room("caches", max_bytes=max_bytes, max_branches=max_branches)
        self.memory = memory
        self.max_bytes = max_bytes
        self.max_branches = max_branches
        self._opened: dict[str, None] = {}  # the ones looked at longest ago first
        self._branches: dict[str, Branch] = {}  # least recently used first
        self._calls: WeakSet[Call] = WeakSet()
        self._lock = RLock()

    def turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        thread: str = "default",
        policy: MemoryPolicy | None = None,
    ) -> Turn:
        """`begin`, and read the whole prompt.

        Raises:
            CompactionFailed: a compaction on the way failed.
            InvalidInput, PromptTooLong: as `begin`.
        """
        turn = self.begin(messages, tools, thread=thread, policy=policy)
        for _ in turn.read():
            pass
        return turn

    def begin(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        thread: str = "default",
        owner: str = "",
        policy: MemoryPolicy | None = None,
    ) -> Turn:
        """Find what is known of a conversation; the rest is still to be read, by `Turn.read`.

        Args:
            messages: all of it, in the form of OpenAI's API: role, content, tool_calls, tool_call_id, name.
            tools: functions that the model may call, in the form of OpenAI's API.
            thread: a name for what belongs together, and for events.
            owner: whose it is: nothing that was read for another owner is used, or can be told from an answer's time.
            policy: None: the memory's. Conversations under another policy are others.

        Raises:
            InvalidInput: no messages, or such as the model's chat template does not take.
            PromptTooLong: what the policy pins leaves no room for anything else.
        """
        found = self.find(messages, tools, thread=thread, owner=owner, policy=policy)
        turn = self.start(found)
        turn.encode()
        turn.tell()
        return turn

    # The same in parts: those that need no device may be done by another thread while sessions go on

    def find(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        thread: str = "default",
        owner: str = "",
        policy: MemoryPolicy | None = None,
        call: Call | None = None,
    ) -> Found:
        """Look at a conversation, and get from the store what it may go on from. Needs no device.

        Args:
            call: of this thread, where it was `called` for before; None: it begins now.

        Raises:
            InvalidInput: no messages, or such as no chat template takes.
        """
        call = call or self.called(thread)
        asked = Asked.of(self.memory.engine, messages, tools, policy or self.memory.policy, owner)
        with self._lock:
            is_known = self._longest(self._branches.values(), asked)[1] >= len(messages)
        return Found(asked, Saved(call) if is_known else self._saved(call, asked.keys))

    def called(self, thread: str) -> Call:
        """A call of a thread that may wait before it looks for anything: deleted meanwhile, it is not kept."""
        call = Call(thread)
        with self._lock:
            self._calls.add(call)
        return call

    def start(self, found: Found) -> Turn:
        """Go on from the kept branch that has most of a conversation; the turn is still to be told the rest."""
        asked = found.asked
        with self._lock:
            self._resume(found.saved)
            branch, count, longest = self._longest(self._branches.values(), asked)
            if branch is not None:
                self._branches[branch.session.name] = self._branches.pop(branch.session.name)
        ends: tuple[int | None, ...]
        if branch is None:
            session, ends = self.memory.scratch(policy=asked.policy, tools=asked.tools), (0,)
        else:
            session, ends = branch.session.fork(policy=asked.policy), branch.ends[:count]
            session.rewind(branch.end_of(count))
        session.rename(found.saved.call.thread)
        rebuilt = None
        if longest > max(count, 1):
            rebuilt = (
                f"the conversation leaves a known one after message {longest - 1} of {len(asked.keys) - 1}, before its "
                f"last compaction; read again from message {max(count - 1, 0)} on"
            )
        return Turn(session, len(session.tokens), rebuilt, self, branch, found.saved.call, asked, ends)

    def num_tokens(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """What reading all of these messages and tools takes, the opening of the answer included."""
        prepared, template_tools = prepare(self.memory.engine, messages, tools)
        chat = self.memory.chat(prepared, template_tools or ())
        return len(chat.encode(chat.write(add_generation_prompt=True)))

    @staticmethod
    def _longest(branches: Iterable[Branch], asked: Asked) -> tuple[Branch | None, int, int]:
        """The branch that shares most and can be cut there, how much that is, and how much any branch shares."""
        best, best_count, longest = None, 1, 1  # the tools alone are nothing read
        for branch in branches:
            count = branch.num_shared(asked)
            longest = max(longest, count)
            if count > best_count and branch.is_exact_at(count):
                best, best_count = branch, count
        return best, best_count if best else 0, longest

    def _take(self, branch: Branch, parent: Branch | None, call: Call) -> Unsaved | None:
        """Keep a branch in memory, in the place of the one that is the same; None where its thread was deleted."""
        with self._lock:
            if call.is_deleted:
                return None
            name = f"{branch.thread}/{branch.keys[-1]}"
            branch.session.metadata[METADATA_KEY] = {
                "thread": branch.thread,
                "keys": list(branch.keys),
                "ends": list(branch.ends),
            }
            self.memory.keep(branch.session, name, overwrite=True)  # its name says all that is in it
            self._branches.pop(name, None)
            self._branches[name] = branch
        packed: Packed | StorageError | None = None
        if self.memory.store is not None:
            try:
                packed = branch.session.packed()
            except StorageError as error:  # raised where it is to be saved
                packed = error
        return Unsaved(branch, parent, call, packed)

    def _save(self, kept: Unsaved) -> None:
        """Save a kept branch, and forget the one that it went on from, where that is for nothing more."""
        branch, parent, name = kept.branch, kept.parent, kept.branch.session.name
        try:
            if parent is not None and self._is_deleted_elsewhere(parent, branch.thread):
                self._forget_deleted(branch)
            elif kept.packed is not None:
                if isinstance(kept.packed, StorageError):
                    raise kept.packed
                with suppress(SessionDeleted):  # since it was kept
                    branch.session.write(kept.packed)
                if kept.call.is_deleted:  # while it was written
                    self._forget(name)
            with self._lock:  # only now: a process that ends in between has lost nothing
                is_replaced = parent is not None and self._is_replaced(parent, branch)
            if parent is not None and is_replaced:
                self._forget(parent.session.name)
        finally:
            with self._lock:
                self._evict(name)

    def _is_deleted_elsewhere(self, parent: Branch, thread: str) -> bool:
        """Whether what a branch went on from was saved, and neither it nor what went on from it is any more.

        Another process that only goes on from it saves its own branch before it takes this one away.
        """
        store = self.memory.store
        if store is None or parent.thread != thread or not (parent.was_saved or parent.session.is_deleted):
            return False
        if store.exists(parent.session.name):
            return False
        looked_at: list[str] = []
        while looked_at != (stored := self._stored(thread)):  # what is taken away meanwhile has left another one
            if any(parent.is_extended_by(kept) for kept in self._kept(thread, stored)):
                return False
            looked_at = stored
        return True

    def _kept(self, thread: str, names: Iterable[str]) -> Iterator[Kept]:
        """Of saved branches, one after another, what was saved with them; nothing of those that cannot be read."""
        for each in names:
            for name, saved in self._read(Call(thread), [each]).sessions:
                with suppress(ValueError):
                    yield Kept.of(name, saved)

    def _forget_deleted(self, branch: Branch) -> None:
        """A branch that goes on from what was deleted elsewhere, and all of its thread that was deleted with it.

        What was begun anew since then stays, and so does what is still to be saved.
        """
        branch.session.deleted()  # so that what goes on from it is not saved either
        stored = self._stored(branch.thread)
        gone = [each.session.name for each in self.branches(branch.thread) if each.was_saved]
        for name in {branch.session.name, *gone}.difference(stored):
            self._forget(name)

    def _is_replaced(self, parent: Branch, branch: Branch) -> bool:
        """Whether all that a branch is for can be had of the one that went on from it.

        Where its end lies in a compacted span of the new one, it stays, to go back to.
        """
        is_ours = self._branches.get(parent.session.name) is parent
        return is_ours and parent.is_extended_by(branch) and branch.session.can_rewind(parent.end_of(len(parent.keys)))

    def _forget(self, name: str) -> None:
        """In memory and in the store."""
        with self._lock:
            self._branches.pop(name, None)
        with suppress(SessionNotFound):
            self.memory.delete(name)

    def _evict(self, newest: str) -> None:
        """Those go first that a longer one went on from, and of these, and of the others, those used longest ago."""
        sizes = {name: branch.session.stats.kv_bytes for name, branch in self._branches.items()}
        total = sum(sizes.values())
        others = [name for name in sizes if name != newest]
        while others and (total > self.max_bytes or len(self._branches) > self.max_branches):
            name = min(others, key=lambda each: not self._is_extended(self._branches[each]))
            others.remove(name)
            total -= sizes[name]
            del self._branches[name]
            self.memory.release(name)

    def _is_extended(self, branch: Branch) -> bool:
        return any(branch.is_extended_by(other) for other in self._branches.values())

    def _saved(self, call: Call, keys: Sequence[str] = ()) -> Saved:
        """Saved branches of a thread that are not in memory, out of the store.

        One whose whole conversation is the beginning of this one is found by its name; the others are looked at once
        for each thread, and not all of them.
        """
        if self.memory.store is None:
            return Saved(call)
        places = {key: place for place, key in enumerate(keys)}
        stored = self._stored(call.thread)
        with self._lock:
            names = [name for name in stored if name not in self._branches]
            beginnings = [name for name in names if _tail(name) in places]
            wanted = sorted(beginnings, key=lambda name: places[_tail(name)])[-1:]
            if call.thread not in self._opened:
                self._opened[call.thread] = None
                wanted += [name for name in names if name not in wanted][:MAX_OPENED]
            while len(self._opened) > MAX_THREADS:
                del self._opened[next(iter(self._opened))]
        return self._read(call, wanted)

    def _read(self, call: Call, names: Iterable[str]) -> Saved:
        read = []
        for name in names:
            try:
                read.append((name, self.memory.saved(name)))
            except StorageError as error:  # of another model, damaged, or gone: it is read again, as if not kept
                logger.warning("%s", error)
        return Saved(call, tuple(read))

    def _resume(self, saved: Saved) -> None:
        for name, each in () if saved.call.is_deleted else saved.sessions:
            if name in self._branches:
                continue
            try:
                kept = Kept.of(name, each)
                session = self.memory.resume(name, each)
            except (StorageError, ValueError) as error:  # not ours, or none that the model could have had
                logger.warning("%r is no branch to go on from: %s", name, error)
                continue
            self._branches[name] = Branch(session, kept.thread, kept.keys, kept.ends)

    def _stored(self, thread: str) -> list[str]:
        names = self.memory.store.names() if self.memory.store is not None else []
        return [name for name in names if name.rpartition("/")[0] == thread]

    def names(self) -> list[str]:
        """The threads that are known, in memory and in the store."""
        stored = self.memory.store.names() if self.memory.store is not None else []
        with self._lock:
            threads = {branch.thread for branch in self._branches.values()}
        return sorted(threads | {name.rpartition("/")[0] for name in stored if "/" in name})

    def branches(self, thread: str) -> list[Branch]:
        """The branches of a thread that are in memory, the most recently used last."""
        with self._lock:
            return [branch for branch in self._branches.values() if branch.thread == thread]

    def all_branches(self) -> list[Branch]:
        """The branches of all threads that are in memory, the most recently used last."""
        with self._lock:
            return list(self._branches.values())

    def saved(self, thread: str) -> Saved:
        """Saved branches of a thread that are not in memory, for `open`: a few of them, where there are many.

        Needs no device: another thread may do it while sessions go on.
        """
        call, stored = self.called(thread), self._stored(thread)
        with self._lock:
            names = [name for name in stored if name not in self._branches]
        return self._read(call, names[:MAX_OPENED])

    def open(self, thread: str, saved: Saved | None = None) -> list[Branch]:
        """The branches of a thread, with saved ones that were not in memory.

        Args:
            saved: what `saved` has found; None: what it finds now.
        """
        saved = saved or self.saved(thread)
        with self._lock:
            self._resume(saved)
            branches = self.branches(thread)
            self._evict(branches[-1].session.name if branches else "")
            return branches

    def delete(self, thread: str) -> bool:
        """Forget a thread, in memory and in the store, saved branches that cannot be read and turns under way too.

        Returns:
            Whether there was anything of it.
        """
        with self._lock:
            calls = [call for call in self._calls if call.thread == thread and not call.is_deleted]
            for call in calls:
                call.is_deleted = True
            mine = {branch.session.name for branch in self.branches(thread)}
        # The store is asked without the lock, for which nobody may wait long.
        names = mine.union(self._stored(thread))
        for name in names:
            self._forget(name)
        return bool(names or calls)

    def prune(self, thread: str, *, keep: int = 1) -> int:
        """Forget a thread's branches but the `keep` used last; returns how many went.

        Raises:
            InvalidInput: a negative number to keep.
        """
        if keep < 0:
            raise InvalidInput(f"keep is {keep}: give the number of branches to keep, 0 or more")
        with self._lock:
            for call in self._calls:
                call.is_deleted |= call.thread == thread and not keep
            used = [branch.session.name for branch in self.branches(thread)]
        kept = used[len(used) - min(keep, len(used)) :]
        gone = [name for name in {*used, *self._stored(thread)} if name not in kept]
        for name in gone:
            self._forget(name)
        return len(gone)

    def copy(self, thread: str, new_thread: str) -> None:
        """Give a thread's branches a second name; memory is shared until the two differ.

        Raises:
            InvalidInput: the thread is not known, or was deleted meanwhile: then nothing of it stays.
        """
        for save in self.copying(thread, new_thread):
            save()

    def copying(self, thread: str, new_thread: str, saved: Saved | None = None) -> Iterator[Callable[[], None]]:
        """`copy`, one branch after another; gives what saves it, which needs no device."""
        saved = saved or self.saved(thread)
        branches, call, copies = self.open(thread, saved), self.called(new_thread), list[str]()
        for branch in branches:
            copied = Branch(branch.session.fork(), new_thread, branch.keys, branch.ends)
            if (kept := self._take(copied, None, call)) is not None:
                copies.append(copied.session.name)
                yield partial(self._save, kept)
            if saved.call.is_deleted:
                break
        if saved.call.is_deleted:
            for name in copies:
                yield partial(self._forget, name)
        if saved.call.is_deleted or not branches:
            raise InvalidInput(f"there is no thread {thread!r}; there are: {', '.join(self.names()) or 'none'}")


def _tail(name: str) -> str:
    return name.rpartition("/")[2]
