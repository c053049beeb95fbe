"""Conversations as chat applications send them: whole, at every call. Only what is new is read.

Each call brings all messages so far. `Threads` finds the kept branch that begins with the same messages, goes on in a
fork of it, and keeps the fork once the answer is complete. A failed, cancelled or repeated call leaves nothing behind.
The messages decide what is reused. A thread's name only decides what is saved, evicted and deleted together. Branches
share memory until they differ. Knows nothing of LangChain or HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import RLock
from weakref import WeakSet

from am_memory.conversations.branch import Branch, BranchMetadata, branch_name
from am_memory.conversations.branch_store import MAX_OPENED, BranchStore, PendingCall, SavedBranches
from am_memory.conversations.prefix_pool import Match, PrefixPool
from am_memory.conversations.prompts import Prompt
from am_memory.conversations.tool_calls import prepare
from am_memory.conversations.turn import ChatTurn, Save
from am_memory.engines.base import Message
from am_memory.errors import InvalidInput, SessionDeleted, SessionNotFound, StorageError, require_room
from am_memory.formatting import counted, mebibytes
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.session.appending import set_template_options
from am_memory.session.saving import Packed, pack, rename, saved_copy, write
from am_memory.session.session import Session
from am_memory.storage.compact_text import CompactText
from am_memory.text.chat_template import RenderedChat

MAX_BYTES = 4 * 2**30
MAX_BRANCHES = 64
OPENINGS_SHARE = 8
"""The system prompts that conversations share get an eighth of the bytes of all caches, beside these."""
MIN_OPENING_TOKENS = 32
"""A shorter system prompt is read again as fast as it is found."""

logger = logging.getLogger("am_memory")


class Threads:
    """The branches of all threads, on one memory.

    Args:
        memory: with a store, every kept branch is saved, and another process finds it again.
        max_bytes: of the caches of all branches; memory that they share is counted for each. Beyond it the least
            recently used are evicted. With a store they are loaded again when needed.
        max_branches: how many branches stay in memory.
    """

    def __init__(self, memory: Memory, *, max_bytes: int = MAX_BYTES, max_branches: int = MAX_BRANCHES) -> None:
        require_room("caches", max_bytes=max_bytes, max_branches=max_branches)
        self.memory = memory
        self._pool = PrefixPool[Branch](max_bytes=max_bytes, max_entries=max_branches)
        self._openings = PrefixPool[Branch](max_bytes=max(max_bytes // OPENINGS_SHARE, 1), max_entries=max_branches)
        self._store = BranchStore(memory)
        self._calls: WeakSet[PendingCall] = WeakSet()
        self._lock = RLock()

    def __repr__(self) -> str:
        branches = self.all_branches()
        threads = counted(len({branch.thread for branch in branches}), "thread")
        kept = f"{counted(len(branches), 'branch', 'branches')} in memory"
        return f"Threads({threads} with {kept}, {mebibytes(self._pool.kv_bytes)})"

    def turn(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        thread: str = "default",
        policy: MemoryPolicy | None = None,
    ) -> ChatTurn:
        """Go on from what is known of a conversation, and read the rest of the prompt.

        Args:
            messages, tools, policy: as `Prompt.of` takes them; None is the memory's policy.

        Raises:
            InvalidInput: no messages, or messages that the model's chat template refuses.
            PromptTooLong: what the policy pins leaves no room for anything else.
            CompactionFailed: a compaction failed.
        """
        prompt = Prompt.of(self.memory.engine, messages, tools, policy or self.memory.policy)
        turn = self.start(prompt, self.find(prompt, self.register_call(thread)))
        turn.encode()
        for _ in turn.read():
            pass
        return turn

    def register_call(self, thread: str) -> PendingCall:
        """Register a call before it does anything: if its thread is deleted meanwhile, nothing of it is kept."""
        call = PendingCall(thread)
        with self._lock:
            self._calls.add(call)
        return call

    def find(self, prompt: Prompt, call: PendingCall) -> SavedBranches:
        """Load the saved branches that a call may go on from. Needs no device."""
        names, match = {name for name, _ in self._pool.items()}, self._longest(prompt)
        if match.num_shared >= len(prompt.keys) - 1:  # all but the last message is known
            return SavedBranches(call)
        return self._store.find(call, prompt.keys, names)

    def start(self, prompt: Prompt, saved: SavedBranches) -> ChatTurn:
        """Go on from the branch that shares most with a prompt, or in a new session."""
        with self._lock:
            self._resume(saved)
            match = self._longest(prompt)
            opening = self._openings.longest(
                lambda branch: branch.num_shared(prompt), Branch.can_rewind, above=max(match.num_shared, 1)
            )
        parent = match.entry if opening.entry is None else None
        branch, count = opening.entry or match.entry, opening.num_shared or match.num_shared
        ends: tuple[int | None, ...]
        if branch is None:
            session, ends = self.memory.scratch(policy=prompt.policy, tools=prompt.tools), (0,)
        else:
            session, ends = branch.session.fork(policy=prompt.policy), branch.ends[:count]
        rename(session, saved.call.thread)  # before it emits events
        set_template_options(session, prompt.options)
        if branch is None:
            for text in prompt.texts:
                session.mount(text)
        else:
            session.rewind(branch.end_of(count))
        num_prepared = prompt.num_prepared[len(ends) - 1]
        assert num_prepared is not None, "both can be cut here"
        return ChatTurn(
            session=session,
            num_cached_tokens=len(session.tokens),
            is_short=prompt.is_short,
            rebuilt=_rebuilt(prompt, match, count),
            _rest=prompt.prepared[num_prepared:],
            _prompt=prompt,
            _ends=ends,
            _add=partial(self._add, saved.call, parent),
            _keep_opening=None if self._openings.get(prompt.opening_key) else partial(self._keep_opening, saved.call),
        )

    def num_tokens(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """Tokens of a whole prompt, the opening of the answer included."""
        return len(self.encode(messages, tools))

    def encode(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        opens_answer: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The token ids of a whole prompt.

        Args:
            opens_answer: also those that open the model's answer.
            options: variables of the chat template.

        Raises:
            InvalidInput: the model's chat template refuses the messages.
        """
        engine, trusts = self.memory.engine, self.memory.trust_messages
        prepared, template_tools = prepare(engine, messages, tools)
        chat = RenderedChat(engine, prepared, template_tools or (), trusts_messages=trusts, options=options)
        return chat.encode(chat.write(add_generation_prompt=opens_answer))

    def _longest(self, prompt: Prompt) -> Match[Branch]:
        """The branch that shares most with a prompt; the tools alone are no tokens to share."""
        return self._pool.longest(lambda branch: branch.num_shared(prompt), Branch.can_rewind, above=1)

    def _keep_opening(
        self, call: PendingCall, session: Session, keys: tuple[str, ...], ends: tuple[int | None, ...]
    ) -> None:
        """Keep the system prompt of a conversation as it was read, before a compaction can reach it.

        Conversations of the same owner that begin with it fork it. It is no branch: it is neither saved nor listed.
        """
        end = ends[-1]
        if end is None or end < MIN_OPENING_TOKENS or not session.can_rewind(end):
            return
        opening = session.fork()
        opening.rewind(end)
        with self._lock:
            if not call.is_deleted:
                self._openings.put(keys[-1], Branch(opening, call.thread, keys, ends))
                self._openings.evict(keys[-1])

    def _add(
        self,
        call: PendingCall,
        parent: Branch | None,
        session: Session,
        keys: tuple[str, ...],
        ends: tuple[int | None, ...],
    ) -> Save:
        """Keep a branch in memory, in place of an equal one; gives the function that saves it.

        If the thread was deleted since the call began, nothing is kept.
        """
        branch = Branch(session, call.thread, keys, ends)
        with self._lock:
            if call.is_deleted:
                return lambda: None
            branch.write_metadata()
            self.memory.keep(session, branch.name, overwrite=True)  # the name is a digest of all that is in it
            self._pool.put(branch.name, branch)
        packed: Packed | StorageError | None = None
        if self.memory.store is not None:
            try:
                packed = pack(session)
            except StorageError as error:  # raised where it is to be saved
                packed = error
        return partial(self._save, call, parent, branch, packed)

    def _save(
        self, call: PendingCall, parent: Branch | None, branch: Branch, packed: Packed | StorageError | None
    ) -> None:
        """Save a kept branch, and delete the one it went on from if it replaces that."""
        try:
            if parent is not None and parent.thread == branch.thread and self._store.was_deleted_elsewhere(parent):
                self._forget_deleted(branch)
            elif packed is not None:
                if isinstance(packed, StorageError):
                    raise packed
                with suppress(SessionDeleted):  # since it was kept
                    write(branch.session, packed)
                if call.is_deleted:  # while it was written
                    self._forget(branch.name)
            # Last, so that a process that is killed before has lost nothing.
            if parent is not None and self._pool.get(parent.name) is parent and parent.is_replaced_by(branch):
                self._forget(parent.name)
        finally:
            with self._lock:
                self._evict(branch.name)

    def _forget_deleted(self, branch: Branch) -> None:
        """Forget a branch that goes on from a deleted one, and the deleted branches of its thread.

        Branches that were begun since then stay, and so do those that are still to be saved.
        """
        saved_copy(branch.session).is_deleted = True  # so that what goes on from it is not saved either
        stored = self._store.names(branch.thread)
        deleted = [other.name for other in self.branches(branch.thread) if other.was_saved]
        for name in {branch.name, *deleted}.difference(stored):
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Delete a branch in memory and in the store."""
        self._pool.remove(name)
        with suppress(SessionNotFound):
            self.memory.delete(name)

    def _evict(self, newest: str) -> None:
        for name in self._pool.evict(newest):
            self.memory.release(name)

    def _resume(self, saved: SavedBranches) -> None:
        """Put loaded branches into the pool."""
        for name, session_file in () if saved.call.is_deleted else saved.sessions:
            if self._pool.get(name) is not None:
                continue
            try:
                metadata = BranchMetadata.of(name, session_file)
                session = self.memory.session(name, saved=session_file)
            except (StorageError, ValueError) as error:  # not a branch, or one that this model could not have had
                logger.warning("%r is no branch to go on from: %s", name, error)
                continue
            self._pool.put(name, Branch(session, metadata.thread, metadata.keys, metadata.ends))

    def names(self) -> list[str]:
        """All threads, in memory and in the store."""
        return sorted({branch.thread for branch in self.all_branches()} | self._store.threads())

    def branches(self, thread: str) -> list[Branch]:
        """The branches of a thread in memory, the most recently used last."""
        return [branch for branch in self.all_branches() if branch.thread == thread]

    def all_branches(self) -> list[Branch]:
        """The branches of all threads in memory, the most recently used last."""
        return self._pool.entries

    def load(self, thread: str) -> SavedBranches:
        """Load saved branches of a thread for `open`, a few where there are many. Needs no device."""
        call, known = self.register_call(thread), {branch.name for branch in self.branches(thread)}
        names = [name for name in self._store.names(thread) if name not in known]
        return self._store.load(call, names[:MAX_OPENED])

    def open(self, thread: str, saved: SavedBranches | None = None) -> list[Branch]:
        """The branches of a thread, saved ones included.

        Args:
            saved: from `load`; None: loaded now.
        """
        saved = saved or self.load(thread)
        with self._lock:
            self._resume(saved)
            branches = self.branches(thread)
            self._evict(branches[-1].name if branches else "")
            return branches

    def delete(self, thread: str) -> bool:
        """Delete a thread in memory and in the store. Damaged branches go too, and calls in progress keep nothing.

        Returns:
            Whether there was anything to delete.
        """
        with self._lock:
            calls = [call for call in self._calls if call.thread == thread and not call.is_deleted]
            for call in calls:
                call.is_deleted = True
            names = {branch.name for branch in self.branches(thread)}
            for name, opening in self._openings.items():
                if opening.thread == thread:
                    self._openings.remove(name)
        names.update(self._store.names(thread))  # without the lock: the store may be slow
        for name in names:
            self._forget(name)
        return bool(names or calls)

    def compact_text(self, thread: str, name: str) -> CompactText:
        """Make a compact text of all that a thread remembers, to hand it to another one; see `Memory.compact_text`.

        Raises:
            InvalidInput: there is no such thread.
        """
        branches = self.open(thread)
        if not branches:
            raise InvalidInput(f"there is no thread {thread!r}; there are: {', '.join(self.names()) or 'none'}")
        return self.memory.compact_text(branches[-1].session, name)

    def prune(self, thread: str, *, keep: int = 1) -> int:
        """Delete a thread's branches but the `keep` used last; returns how many were deleted.

        Raises:
            InvalidInput: `keep` is negative.
        """
        if keep < 0:
            raise InvalidInput(f"keep is {keep}: give the number of branches to keep, 0 or more")
        with self._lock:
            for call in self._calls:
                call.is_deleted |= call.thread == thread and not keep
            names = [branch.name for branch in self.branches(thread)]
        kept = names[len(names) - min(keep, len(names)) :]
        deleted = {*names, *self._store.names(thread)}.difference(kept)
        for name in deleted:
            self._forget(name)
        return len(deleted)

    def copy(self, thread: str, new_thread: str) -> None:
        """Copy a thread's branches to a second name. The two share memory until they differ.

        Raises:
            InvalidInput: there is no such thread, or it was deleted meanwhile; then the copies are deleted too.
        """
        for save in self.copying(thread, new_thread):
            save()

    def copying(self, thread: str, new_thread: str, saved: SavedBranches | None = None) -> Iterator[Save]:
        """`copy`, one branch after another; gives the functions that save the copies, which need no device."""
        saved = saved or self.load(thread)
        branches, call = self.open(thread, saved), self.register_call(new_thread)
        copies: list[str] = []
        for branch in branches:
            copies.append(branch_name(new_thread, branch.keys))
            yield self._add(call, None, branch.session.fork(), branch.keys, branch.ends)
            if saved.call.is_deleted:
                break
        if saved.call.is_deleted:
            for name in copies:
                yield partial(self._forget, name)
        if saved.call.is_deleted or not branches:
            raise InvalidInput(f"there is no thread {thread!r}; there are: {', '.join(self.names()) or 'none'}")


def _rebuilt(prompt: Prompt, match: Match[Branch], num_shared: int) -> str | None:
    """Why known messages are read again; None where none are."""
    if match.most_shared <= max(num_shared, 1):
        return None
    return (
        f"the conversation leaves a known one after message {match.most_shared - 1} of {len(prompt.keys) - 1}, before "
        f"its last compaction; read again from message {max(num_shared - 1, 0)} on"
    )
