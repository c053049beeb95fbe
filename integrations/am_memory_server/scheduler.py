"""Whose turn it is on the device: one thread, many jobs, a step of each in turn; and who waits for a turn at all.

Owns the threads, the queues and their limits. Knows no HTTP, no messages and no model: a job is something that can be
done in short steps, and that posts what it has found. What needs no device goes aside, to threads that keep nobody's
turn: a job says so by what it yields.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any, Generic, TypeVar

from am_memory.errors import AMMemoryError

T = TypeVar("T")
Post = Callable[[object], None]
Path = tuple[str, ...]
"""Between whom turns are taken: an owner, then a conversation of theirs."""

NUM_ASIDE = 4
"""Threads for what needs no device; an owner has one of them at a time."""
SWITCH_SECONDS = 0.0005
"""For `sys.setswitchinterval` of a process that serves: the device's thread gives the interpreter away at each of the
many operations of a token, and waits for it each time for as long as another thread may have it, which is 5 ms else."""
MAX_UNREAD = 256
"""Of what a job has posted; one whose consumer is further behind waits for it."""


@dataclass(frozen=True)
class Aside:
    """What a job yields that wants something done which needs no device, and may take long."""

    function: Callable[[], Any]


def aside(function: Callable[[], T]) -> Generator[Aside, Any, T]:
    """`result = yield from aside(function)`, in a job: others have their turns while this is done."""
    result: T = yield Aside(function)
    return result


Steps = Generator[Aside | None, Any, T]
"""A job under way: where it yields others may have their turns."""
Look = Callable[[], Any]
"""What is done first, aside, as it needs no device."""
Job = Callable[[Post, Any], Steps[object]]
"""A job: it is given what the look before it has found, and posts what it finds itself."""


class QueueFull(AMMemoryError):
    """Too many requests of one owner wait already."""


class ShuttingDown(AMMemoryError):
    """The server takes nothing new."""


class NotRead(AMMemoryError):
    """An answer is not read, and too many of its owner's are not."""


class FairQueue(Generic[T]):
    """Takes turns between the first names of the paths, then between the second ones, and so on.

    Whoever comes new has the next turn but those of others who wait already: not behind the one that had the last.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._branches: OrderedDict[str, FairQueue[T]] = OrderedDict()
        self._last = ""

    def push(self, path: Path, item: T) -> None:
        if not path:
            self._items.append(item)
            return
        if path[0] not in self._branches:
            self._branches[path[0]] = FairQueue()
            if self._last in self._branches:
                self._branches.move_to_end(self._last)
        self._branches[path[0]].push(path[1:], item)

    def pop(self, name: str | None = None) -> T:
        """The next one; of those whose path begins with `name`, where it is given."""
        if self._items:
            return self._items.popleft()
        self._last = next(iter(self._branches)) if name is None else name
        branch = self._branches.pop(self._last)
        item = branch.pop()
        if len(branch):
            self._branches[self._last] = branch
        return item

    def discard(self, path: Path, item: T) -> bool:
        """Take an item out of its place; whether it was there."""
        if not path:
            if is_there := item in self._items:
                self._items.remove(item)
            return is_there
        branch = self._branches.get(path[0])
        if branch is None or not branch.discard(path[1:], item):
            return False
        if not len(branch):
            del self._branches[path[0]]
        return True

    @property
    def names(self) -> list[str]:
        """With which the paths begin, in the order of their turns."""
        return list(self._branches)

    def count(self, name: str) -> int:
        """Items whose path begins with this name."""
        return len(self._branches.get(name, ()))

    def __len__(self) -> int:
        return len(self._items) + sum(map(len, self._branches.values()))


@dataclass(frozen=True)
class _End:
    value: object
    error: Exception | None


@dataclass(eq=False)
class _Job:
    path: Path
    line: Line
    job: Job | None
    loop: asyncio.AbstractEventLoop
    posted: asyncio.Queue[object] = field(default_factory=asyncio.Queue)
    num_posted: int = 0
    num_taken: int = 0
    is_cancelled: bool = False
    steps: Steps[object] | None = None
    aside: Aside | None = None  # what it wants before its next step
    found: object = None
    failed: Exception | None = None

    @property
    def owner(self) -> str:
        return self.path[0]

    def post(self, item: object) -> None:
        if not self.is_cancelled and not self.loop.is_closed():
            self.num_posted += 1
            self.loop.call_soon_threadsafe(self.posted.put_nowait, item)

    def step(self) -> bool:
        """One step; whether it was the last. What is wanted aside before the next one is in `aside`."""
        try:
            found, failed, self.found, self.failed = self.found, self.failed, None, None
            if self.steps is None:
                if failed is not None or self.job is None:
                    self.post(_End(found, failed))
                    return True
                self.steps, found = self.job(self.post, found), None
            if self.is_cancelled:
                self.steps.close()
                return True
            self.aside = self.steps.send(found) if failed is None else self.steps.throw(failed)
            return False
        except StopIteration as stop:
            self.post(_End(stop.value, None))
        except Exception as error:  # whatever it is, it is raised where the job is waited for
            self.post(_End(None, error))
        return True

    def step_aside(self) -> None:
        """What it wants aside."""
        wanted, self.aside = self.aside, None
        assert wanted is not None
        try:
            self.found = wanted.function()
        except Exception as error:  # raised in the job, where this was asked for
            self.failed = error


class Line:
    """Jobs that wait for a place, and the places that there are.

    An owner has one more where one is free, or where they have fewer than their share: nobody can hold all places, and
    nobody waits for a first one.

    Args:
        num_places: for all owners together, beside those that they have for their shares.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self.waiting: FairQueue[_Job] = FairQueue()
        self.held: Counter[str] = Counter()

    def admitted(self) -> Iterator[_Job]:
        """Those whose turn has come, each with a place."""
        while (owner := self._next()) is not None:
            self.held[owner] += 1
            yield self.waiting.pop(owner)

    def _next(self) -> str | None:
        waiting = self.waiting.names
        share = max(self.num_places // len({*waiting, *self.held} or {""}), 1)
        is_free = self.held.total() < self.num_places
        return next((owner for owner in waiting if is_free or self.held[owner] < share), None)

    def leave(self, owner: str) -> None:
        """Give a place back."""
        self.held[owner] -= 1
        self.held += Counter()  # without those that hold none


class Scheduler:
    """Runs jobs on one thread of its own, the device's, in turn between their owners at every step.

    Args:
        max_active: streams that take turns step by step; the others wait for one of them to end. Each owner has a share
            of these places, whoever else holds how many.
        max_queued: jobs of one owner that may wait.
    """

    def __init__(self, *, max_active: int, max_queued: int) -> None:
        self._max_queued = max_queued
        self._changed = Condition()
        self._streams, self._calls = Line(max_active), Line(0)
        self._due: FairQueue[_Job] = FairQueue()
        self._asides: FairQueue[_Job] = FairQueue()
        self._aside_of: set[str] = set()  # owners of what is done aside at the moment
        self._unread: set[_Job] = set()  # those that wait for their consumers
        self._resting: dict[_Job, None] = {}  # begun, and without a place: unread, or read again and in line for one
        self._num_jobs = 0
        self._is_closing = False
        self._threads = [Thread(target=self._work, name="am_memory device", daemon=True)]
        self._threads += [
            Thread(target=self._work_aside, name=f"am_memory aside {number}", daemon=True)
            for number in range(NUM_ASIDE)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that have no place yet."""
        with self._changed:
            return len(self._streams.waiting) + len(self._calls.waiting)

    @property
    def num_active(self) -> int:
        """Streams that have a place."""
        with self._changed:
            return self._streams.held.total()

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    async def stream(self, path: Path, job: Job, look: Look | None = None) -> AsyncGenerator[object, None]:
        """What a job posts, as it posts it. A consumer that stops to iterate ends it; one that is slow holds it up.

        While it is held up it has no place. Of each owner as many may be so as there are places, as each takes memory:
        one more ends the one that has been for longest.

        Args:
            look: done before, aside.

        Raises:
            QueueFull, ShuttingDown: it is not taken.
            NotRead: it was ended.
            whatever the job raises.
        """
        taken = self._take(path, job, self._streams, look)
        try:
            while not isinstance(item := await self._next_of(taken), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            self._give_up(taken)

    async def call(self, path: Path, steps: Callable[[], Steps[T]]) -> T:
        """What something short returns. An owner's calls are made one after the other, in turn with their streams.

        Raises:
            QueueFull, ShuttingDown: it is not taken.
            whatever it raises.
        """
        return await self._end_of(self._take(path, lambda post, found: steps(), self._calls))  # type: ignore[return-value]

    async def look(self, path: Path, function: Callable[[], T]) -> T:
        """`call`, of what needs no device at all, and so waits for nobody else's step.

        Raises:
            QueueFull, ShuttingDown: it is not taken.
            whatever it raises.
        """
        return await self._end_of(self._take(path, None, self._calls, function))  # type: ignore[return-value]

    async def _end_of(self, job: _Job) -> object:
        try:
            end = await self._next_of(job)
            assert isinstance(end, _End)
            if end.error is not None:
                raise end.error
            return end.value
        finally:
            self._give_up(job)

    def _take(self, path: Path, job: Job | None, line: Line, look: Look | None = None) -> _Job:
        first = None if look is None else Aside(look)
        taken = _Job(path, line, job, asyncio.get_running_loop(), aside=first)
        with self._changed:
            if self._is_closing:
                raise ShuttingDown("the server is shutting down: try again in a moment")
            waiting = sum(each.waiting.count(taken.owner) for each in (self._streams, self._calls))
            if waiting >= self._max_queued:
                raise QueueFull(f"{waiting} requests of this key are waiting already: send fewer at once, or try again")
            self._num_jobs += 1
            line.waiting.push(path, taken)
            self._admit(line)
        return taken

    async def _next_of(self, job: _Job) -> object:
        item = await job.posted.get()
        with self._changed:
            job.num_taken += 1
            if job in self._unread:
                self._go_on(job)
        return item

    def _give_up(self, job: _Job) -> None:
        """Nobody waits for it any more: if it has begun, it is closed at its next turn."""
        with self._changed:
            job.is_cancelled = True
            is_in_line = job.line.waiting.discard(job.path, job)
            if is_in_line and job not in self._resting:
                self._num_jobs -= 1
            elif is_in_line or job in self._unread or self._asides.discard(job.path, job):
                self._go_on(job)
            self._changed.notify_all()

    # What follows is called with the lock

    def _admit(self, line: Line) -> None:
        for job in line.admitted():
            self._resting.pop(job, None)
            (self._due if job.aside is None else self._asides).push(job.path, job)
        self._changed.notify_all()

    def _go_on(self, job: _Job) -> None:
        """It is to have its next turn, once what it posted is read."""
        is_behind = job.num_posted - job.num_taken > MAX_UNREAD
        if is_behind and not job.is_cancelled and not self._is_closing:
            self._unread.add(job)
            if job not in self._resting:
                self._rest(job)
            return
        self._unread.discard(job)
        if job in self._resting and not job.is_cancelled:
            job.line.waiting.push(job.path, job)
            self._admit(job.line)
        else:
            self._due.push(job.path, job)
            self._changed.notify_all()

    def _rest(self, job: _Job) -> None:
        """Its place is somebody else's until it is read again."""
        self._resting[job] = None
        job.line.leave(job.owner)
        mine = [each for each in self._resting if each.owner == job.owner]
        if len(mine) > job.line.num_places:
            self._end(next(each for each in mine if each in self._unread), len(mine))
        self._admit(job.line)

    def _end(self, job: _Job, num_unread: int) -> None:
        """Close it at its next turn; its consumer is told after what was posted."""
        told = f"this answer was ended, as {num_unread} answers of this key were not read as fast as they came: read"
        job.post(_End(None, NotRead(f"{told} them sooner, or ask for fewer at once")))
        job.is_cancelled = True
        self._go_on(job)

    def _stepped(self, job: _Job, is_last: bool) -> None:
        if is_last:
            self._num_jobs -= 1
            if job in self._resting:
                del self._resting[job]
            else:
                job.line.leave(job.owner)
            self._admit(job.line)
        elif job.aside is not None and not job.is_cancelled:
            self._asides.push(job.path, job)
            self._changed.notify_all()
        else:
            self._go_on(job)

    @property
    def _is_done(self) -> bool:
        return self._is_closing and not self._num_jobs

    # The threads

    def close(self) -> None:
        """Take nothing new, finish what was taken and not given up, and end the threads."""
        with self._changed:
            self._is_closing = True
            for job in list(self._unread):
                self._go_on(job)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._due) or self._is_done)
                if not len(self._due):
                    return
                job = self._due.pop()
            is_last = job.step()
            with self._changed:
                self._stepped(job, is_last)

    def _work_aside(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next_aside() is not None or self._is_done)
                if (owner := self._next_aside()) is None:
                    return
                job = self._asides.pop(owner)
                self._aside_of.add(owner)
            job.step_aside()
            # What was only to be looked at, or could not be, needs no turn to end.
            is_last = job.steps is None and (job.job is None or job.failed is not None) and job.step()
            with self._changed:
                self._aside_of.remove(owner)
                self._stepped(job, is_last)
                self._changed.notify_all()

    def _next_aside(self) -> str | None:
        return next((owner for owner in self._asides.names if owner not in self._aside_of), None)
