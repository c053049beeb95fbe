"""Conversations as chat applications send them: whole, at every call. Only what is new is read.

Each call brings all messages so far. `Threads` finds the kept branch that begins with the same ones, goes on in a fork
of it, and keeps the fork once the answer is complete: a failed, cancelled or repeated call leaves nothing behind.
Messages are the truth; a thread's name only says what is saved, evicted and deleted together. Branches share memory
until they differ. Knows nothing of LangChain or HTTP.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from threading import RLock
from weakref import WeakSet

from am_memory.engines.base import Message
from am_memory.errors import InvalidInput, SessionDeleted, SessionNotFound, StorageError, require_room
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.session import Session
from am_memory.tool_calls import prepare

MAX_BYTES = 4 * 2**30
MAX_BRANCHES = 64
MAX_OPENED = 8
"""Saved branches of a thread that are read when it is first called for."""
METADATA_KEY = "am_memory.branch"

logger = logging.getLogger("am_memory")


@dataclass
class Branch:
    """One conversation that is kept.

    Attributes:
        thread: what it belongs to.
        keys: a digest of policy and tools, then one of each message.
        ends: tokens of the session after each of these; None where it cannot be cut.
    """

    session: Session
    thread: str
    keys: tuple[str, ...]
    ends: tuple[int | None, ...]

    def num_shared(self, keys: Sequence[str]) -> int:
        """How many of the first keys are this branch's too, counted to the last place where it can be cut."""
        pairs = zip(self.keys, keys, strict=False)
        shared = next((i for i, (mine, other) in enumerate(pairs) if mine != other), min(len(self.keys), len(keys)))
        return next((count for count in range(shared, 0, -1) if self.ends[count - 1] is not None), 0)

    def end_of(self, count: int) -> int:
        """Tokens of the first `count` entries, where `num_shared` allows the cut."""
        end = self.ends[count - 1]
        assert end is not None
        return end

    def is_exact_at(self, count: int) -> bool:
        """Whether it can go on from there without reading anything again."""
        return self.session.can_rewind(self.end_of(count))

    def extends(self, other: Branch) -> bool:
        """Whether the other's conversation is the beginning of this one."""
        is_longer = self.thread == other.thread and len(self.keys) > len(other.keys)
        return is_longer and self.keys[: len(other.keys)] == other.keys


@dataclass(eq=False)
class Call:
    """A turn under way, from before anything is known of it: whoever deletes a thread tells all that are of it."""

    thread: str
    is_deleted: bool = False


@dataclass
class Turn:
    """One call: a session that has been told the prompt, and is kept when `keep` is called.

    Attributes:
        session: a scratch branch of its own, to `generate` with.
        num_cached_tokens: of the conversation, how many were not read in this call.
        rebuilt: why tokens that a branch had read were read again; None where they were not.
    """

    session: Session
    num_cached_tokens: int
    rebuilt: str | None
    _call: Call = field(repr=False)
    _threads: Threads = field(repr=False)
    _parent: Branch | None = field(repr=False)
    _keys: tuple[str, ...] = field(repr=False)
    _ends: tuple[int | None, ...] = field(repr=False)

    def read(self) -> Iterator[int]:
        """Read the prompt, one chunk after another; gives the number of tokens that are left after each.

        Raises:
            CompactionFailed: a compaction on the way failed.
        """
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
        keys, ends = (*self._keys, key_of(answer)), (*self._ends, len(self.session.tokens))
        self._threads._keep(Branch(self.session, self._call.thread, keys, ends), self._parent, self._call)


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
        self._opened: set[str] = set()
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
        if not messages:
            raise InvalidInput("there are no messages: give at least one")
        policy = policy or self.memory.policy
        told = [policy.model_dump(mode="json"), *tools, *([{"owner": owner}] if owner else [])]
        keys = (_digest(told), *(key_of(message) for message in messages))
        call = Call(thread)
        with self._lock:
            self._calls.add(call)
            branch, count, rebuilt = self._best(thread, keys)
        prepared, template_tools = prepare(self.memory.engine, messages, tools)
        ends: tuple[int | None, ...]
        if branch is None:
            session, ends = self.memory.scratch(policy=policy, tools=template_tools or ()), (0,)
        else:
            session, ends = branch.session.fork(policy=policy), branch.ends[:count]
            session.rewind(branch.end_of(count))
        session.rename(thread)
        num_cached = len(session.tokens)
        num_known = _num_prepared(self.memory, messages[: len(ends) - 1], tools)
        if prepared[num_known:]:
            session.tell(prepared[num_known:])
        ends = (*ends, *self._ends(session, messages, tools, len(ends) - 1, prepared))
        return Turn(session, num_cached, rebuilt, call, self, branch, keys, ends)

    def num_tokens(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> int:
        """What reading all of these messages and tools takes, the opening of the answer included."""
        engine = self.memory.engine
        prepared, template_tools = prepare(engine, messages, tools)
        return len(engine.encode(engine.render(prepared, tools=template_tools, add_generation_prompt=True)))

    def _best(self, thread: str, keys: Sequence[str]) -> tuple[Branch | None, int, str | None]:
        """The branch to go on from, how many entries of it hold, and why not a longer one."""
        found = self._longest(self._branches.values(), keys)
        if found[1] < len(keys) - 1 and self._load(thread, keys):
            found = self._longest(self._branches.values(), keys)
        branch, count, longest = found
        rebuilt = None
        if longest > max(count, 1):
            rebuilt = (
                f"the conversation leaves a known one after message {longest - 1} of {len(keys) - 1}, before its last "
                f"compaction; read again from message {max(count - 1, 0)} on"
            )
        if branch is not None:
            self._branches[branch.session.name] = self._branches.pop(branch.session.name)
        return branch, count, rebuilt

    @staticmethod
    def _longest(branches: Iterable[Branch], keys: Sequence[str]) -> tuple[Branch | None, int, int]:
        """The branch that shares most and can be cut there, how much that is, and how much any branch shares."""
        best, best_count, longest = None, 1, 1  # the tools alone are nothing read
        for branch in branches:
            count = branch.num_shared(keys)
            longest = max(longest, count)
            while count > best_count and not (branch.ends[count - 1] is not None and branch.is_exact_at(count)):
                count -= 1
            if count > best_count:
                best, best_count = branch, count
        return best, best_count if best else 0, longest

    def _ends(
        self,
        session: Session,
        messages: Sequence[Message],
        tools: Sequence[Message],
        num_known: int,
        prepared: Sequence[Message],
    ) -> list[int | None]:
        """Tokens after each of the messages that were just read; None inside of what the template writes as one."""
        starts, ends = session.message_starts, list[int | None]()
        for count in range(num_known + 1, len(messages) + 1):
            part = prepare(self.memory.engine, messages[:count], tools)[0]
            is_prefix = part == prepared[: len(part)]
            end = len(session.tokens) if len(part) == len(prepared) else starts[len(part)]
            ends.append(end if is_prefix else None)
        return ends

    def _keep(self, branch: Branch, parent: Branch | None, call: Call | None = None) -> None:
        with self._lock:
            if call is not None and call.is_deleted:
                return
            name = f"{branch.thread}/{_chain(branch.keys)[-1]}"
            branch.session.metadata[METADATA_KEY] = {
                "thread": branch.thread,
                "keys": list(branch.keys),
                "ends": list(branch.ends),
            }
            self.memory.keep(branch.session, name)
            self._branches.pop(name, None)
            self._branches[name] = branch
        try:
            if self.memory.store is not None:
                with suppress(SessionDeleted):  # since it was kept
                    branch.session.save()
            with self._lock:  # only now: a process that ends in between has lost nothing
                if parent is not None and self._is_replaced(parent, branch):
                    self._forget(parent.session.name)
        finally:
            with self._lock:
                self._evict(name)

    def _is_replaced(self, parent: Branch, branch: Branch) -> bool:
        """Whether all that a branch is for can be had of the one that went on from it.

        Where its end lies in a compacted span of the new one, it stays, to go back to.
        """
        is_ours = self._branches.get(parent.session.name) is parent
        return is_ours and branch.extends(parent) and branch.session.can_rewind(parent.end_of(len(parent.keys)))

    def _forget(self, name: str) -> None:
        """In memory and in the store."""
        with suppress(SessionNotFound):
            self.memory.delete(name)
        self._branches.pop(name, None)

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
        return any(other.extends(branch) for other in self._branches.values())

    def _load(self, thread: str, keys: Sequence[str]) -> bool:
        """Bring saved branches of a thread that are not in memory; whether there were any.

        One whose whole conversation is the beginning of this one is found by its name; the others are looked at once
        for each thread, and not all of them.
        """
        if self.memory.store is None:
            return False
        chain = _chain(keys)
        names = [name for name in self._stored(thread) if name not in self._branches]
        beginnings = [name for name in names if _tail(name) in chain]
        wanted = sorted(beginnings, key=lambda name: chain.index(_tail(name)))[-1:]
        if thread not in self._opened:
            self._opened.add(thread)
            wanted += [name for name in names if name not in wanted][:MAX_OPENED]
        for name in wanted:
            self._open(name)
        return bool(wanted)

    def _open(self, name: str) -> None:
        try:
            session = self.memory.session(name)
        except StorageError as error:  # of another model, or damaged: it is read again, as if it had not been kept
            logger.warning("%s", error)
            return
        saved = session.metadata.get(METADATA_KEY)
        if isinstance(saved, dict):
            self._branches[name] = Branch(session, saved["thread"], tuple(saved["keys"]), tuple(saved["ends"]))

    def _stored(self, thread: str) -> list[str]:
        names = self.memory.store.names() if self.memory.store is not None else []
        return [name for name in names if name.rpartition("/")[0] == thread]

    def names(self) -> list[str]:
        """The threads that are known, in memory and in the store."""
        with self._lock:
            stored = self.memory.store.names() if self.memory.store is not None else []
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

    def open(self, thread: str) -> list[Branch]:
        """The branches of a thread, with saved ones that are not in memory: a few of them, where there are many."""
        with self._lock:
            for name in [name for name in self._stored(thread) if name not in self._branches][:MAX_OPENED]:
                self._open(name)
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
            InvalidInput: the thread is not known.
        """
        with self._lock:
            self._load(thread, ())
            branches = self.branches(thread)
            if not branches:
                raise InvalidInput(f"there is no thread {thread!r}; there are: {', '.join(self.names()) or 'none'}")
            for branch in branches:
                self._keep(Branch(branch.session.fork(), new_thread, branch.keys, branch.ends), None)


def key_of(message: Message) -> str:
    """A digest of what a message says; the ids of tool calls that nobody answers to are left out."""
    said = {name: value for name, value in message.items() if name != "id" and value not in (None, [], "")}
    if isinstance(calls := said.get("tool_calls"), Sequence):
        said["tool_calls"] = [_call(call) for call in calls]
    return _digest(said)


def _call(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    arguments = function.get("arguments")
    with suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"name": function.get("name"), "arguments": arguments}


def _chain(keys: Sequence[str]) -> list[str]:
    """For each key, a digest of it and all before."""
    return list(itertools.accumulate(keys, lambda before, key: _digest([before, key])))


def _tail(name: str) -> str:
    return name.rpartition("/")[2]


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _num_prepared(memory: Memory, messages: Sequence[Message], tools: Sequence[Message]) -> int:
    return len(prepare(memory.engine, messages, tools)[0]) if messages else 0
