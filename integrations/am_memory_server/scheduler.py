"""Whose turn it is on the device: one thread, many answers, a step of each in turn.

Owns the thread, the queue and its limits. Knows no HTTP, no messages and no model: a job is something that can be done
in short steps, and that posts what it has found.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Generic, TypeVar

from am_memory.errors import AMMemoryError

T = TypeVar("T")
Post = Callable[[object], None]
Steps = Callable[[Post], Generator[None, None, None]]
"""A job: it posts what it finds, and yields where another one may have its turn."""
Path = tuple[str, ...]
"""Between whom turns are taken: an owner, then a conversation of theirs."""


class QueueFull(AMMemoryError):
    """Too many requests of one owner wait already."""


class ShuttingDown(AMMemoryError):
    """The server takes nothing new."""


class FairQueue(Generic[T]):
    """Takes turns between the first names of the paths, then between the second ones, and so on."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._branches: OrderedDict[str, FairQueue[T]] = OrderedDict()

    def push(self, path: Path, item: T) -> None:
        if path:
            self._branches.setdefault(path[0], FairQueue()).push(path[1:], item)
        else:
            self._items.append(item)

    def pop(self) -> T:
        if self._items:
            return self._items.popleft()
        name, branch = self._branches.popitem(last=False)
        item = branch.pop()
        if len(branch):
            self._branches[name] = branch
        return item

    def discard(self, path: Path, item: T) -> None:
        """Take an item out of its place, if it is there."""
        if not path:
            with suppress(ValueError):
                self._items.remove(item)
        elif branch := self._branches.get(path[0]):
            branch.discard(path[1:], item)
            if not len(branch):
                del self._branches[path[0]]

    def count(self, name: str) -> int:
        """Items whose path begins with this name."""
        return len(self._branches.get(name, ()))

    def __len__(self) -> int:
        return len(self._items) + sum(map(len, self._branches.values()))


@dataclass(frozen=True)
class _End:
    error: Exception | None


@dataclass(eq=False)
class _Job:
    path: Path
    steps: Steps
    loop: asyncio.AbstractEventLoop
    posted: asyncio.Queue[object] = field(default_factory=asyncio.Queue)
    generator: Generator[None, None, None] | None = None
    is_cancelled: bool = False

    def post(self, item: object) -> None:
        if not self.is_cancelled and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.posted.put_nowait, item)

    def step(self) -> bool:
        """One step; whether there are more."""
        if self.generator is None:
            self.generator = self.steps(self.post)
        try:
            if not self.is_cancelled:
                next(self.generator)
                return True
            self.generator.close()
        except StopIteration:
            self.post(_End(None))
        except Exception as error:  # whatever it is, it is raised where the job is waited for
            self.post(_End(error))
        return False


class Scheduler:
    """Runs jobs on one thread of its own.

    Args:
        max_active: jobs that take turns step by step; the others wait for one of them to end.
        max_queued: jobs of one owner that may wait.
    """

    def __init__(self, *, max_active: int, max_queued: int) -> None:
        self._max_active, self._max_queued = max_active, max_queued
        self._changed = Condition()
        self._waiting: FairQueue[_Job] = FairQueue()
        self._active: FairQueue[_Job] = FairQueue()
        self._errands: deque[Callable[[], None]] = deque()
        self._is_stepping = False
        self._is_closing = False
        self._thread = Thread(target=self._work, name="am_memory device", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    @property
    def num_active(self) -> int:
        with self._changed:
            return len(self._active) + self._is_stepping

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    async def stream(self, path: Path, steps: Steps) -> AsyncGenerator[object, None]:
        """What a job posts, as it posts it. A consumer that stops to iterate ends the job.

        Raises:
            QueueFull, ShuttingDown: it is not taken.
            whatever the job raises.
        """
        job = _Job(path, steps, asyncio.get_running_loop())
        with self._changed:
            self._require_open()
            if self._waiting.count(path[0]) >= self._max_queued:
                raise QueueFull(
                    f"{self._max_queued} requests of this key are waiting already: send fewer at once, or try again"
                )
            self._waiting.push(path, job)
            self._changed.notify()
        try:
            while not isinstance(item := await job.posted.get(), _End):
                yield item
            if item.error is not None:
                raise item.error
        finally:
            with self._changed:
                job.is_cancelled = True
                self._waiting.discard(path, job)  # one that is active is closed when its turn comes
                self._changed.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """The result of something short, which goes before the next step of any job."""
        future: Future[T] = Future()

        def errand() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # raised where the result is waited for
                future.set_exception(error)

        with self._changed:
            self._require_open()
            self._errands.append(errand)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def _require_open(self) -> None:
        if self._is_closing:
            raise ShuttingDown("the server is shutting down: try again in a moment")

    def close(self) -> None:
        """Take nothing new, finish what was taken and not given up, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._errands or len(self._waiting) or len(self._active) or self._is_closing
                )
                errand = self._errands.popleft() if self._errands else None
                job = None if errand else self._next_job()
                if errand is None and job is None and self._is_closing:
                    return
            if errand is not None:
                errand()
            elif job is not None:
                has_more = job.step()
                with self._changed:
                    self._is_stepping = False
                    if has_more:
                        self._active.push(job.path, job)

    def _next_job(self) -> _Job | None:
        """The job whose turn it is, out of the queue; called with the lock."""
        while len(self._active) < self._max_active and len(self._waiting):
            job = self._waiting.pop()
            self._active.push(job.path, job)
        if not len(self._active):
            return None
        self._is_stepping = True
        return self._active.pop()
