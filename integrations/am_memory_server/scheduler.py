"""Runs jobs: one device thread, a step of each job in turn, and some host threads for work that needs no device.

What jobs await together, as the tokens of their answers, is done for all of them between two of these steps.

Owns the threads, the queues and their limits. Knows no HTTP, no messages and no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from threading import Condition, Thread
from typing import Any, TypeVar

from am_memory_server.fair_queue import FairLimit, FairQueue
from am_memory_server.jobs import (
    AnswerNotRead,
    HostCall,
    Job,
    JobEnd,
    QueuedJob,
    QueueFull,
    ShuttingDown,
    Steps,
    TurnKey,
)

T = TypeVar("T")

Together = Callable[[Sequence[Any], Sequence[TurnKey]], None]

NUM_HOST_THREADS = 4
"""An owner uses one of them at a time."""
SWITCH_SECONDS = 0.0005
"""For `sys.setswitchinterval` in a process that serves. The device thread releases the GIL at each of the many
operations of a token; with the default of 5 ms it would wait that long each time another thread is busy."""
MAX_UNREAD = 256
"""Updates of one job that its client has not read; with more the job is blocked."""


class Scheduler:
    """Runs jobs on one device thread, a step in turn for each owner.

    A stream is blocked while its client does not read. A blocked stream is parked: it keeps its state, but does not
    count as active.

    Args:
        max_active: streams that take turns; the others wait for one of them to end. Each owner has a share of them.
        max_queued: waiting jobs of one owner.
        together: does what several jobs await, or a part of it; some have news then. It gets their keys too, to take
            turns where it cannot do all at once. None: each job does it alone.
    """

    def __init__(self, *, max_active: int, max_queued: int, together: Together | None = None) -> None:
        self._max_queued, self._together = max_queued, together
        self._changed = Condition()
        self._streams: FairLimit[QueuedJob] = FairLimit(max_active)
        self._calls: FairLimit[QueuedJob] = FairLimit(0)  # an owner's calls run one after the other
        self._ready: FairQueue[QueuedJob] = FairQueue()  # for the device thread
        self._awaiting: dict[QueuedJob, None] = {}  # for the device thread as well
        self._host_queue: FairQueue[QueuedJob] = FairQueue()
        self._host_owners: set[str] = set()  # whose host call is being made
        self._blocked: set[QueuedJob] = set()  # their clients do not read
        self._parked: dict[QueuedJob, None] = {}  # started, but not active: blocked, or waiting to become active again
        self._num_jobs = 0
        self._is_closing = False
        self._threads = [Thread(target=self._run_device, name="am_memory device", daemon=True)]
        self._threads += [
            Thread(target=self._run_host, name=f"am_memory host {number}", daemon=True)
            for number in range(NUM_HOST_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait to become active."""
        with self._changed:
            return len(self._streams.waiting) + len(self._calls.waiting)

    @property
    def num_active(self) -> int:
        """Streams that take turns."""
        with self._changed:
            return self._streams.active.total()

    @property
    def is_closing(self) -> bool:
        """Whether new jobs are refused."""
        return self._is_closing

    async def stream(
        self, key: TurnKey, job: Job, prepare: Callable[[], Any] | None = None
    ) -> AsyncGenerator[object, None]:
        """The updates of a job. The job ends when nobody iterates any more.

        A slow client blocks its job. An owner may have `max_active` blocked jobs, because each takes memory; one more
        ends the job that has been blocked longest.

        Args:
            prepare: called on a host thread first; the job gets its result.

        Raises:
            QueueFull, ShuttingDown: the job is not accepted.
            AnswerNotRead: the job was ended because it was blocked.
            Exception: whatever the job raises.
        """
        queued = self._submit(key, job, self._streams, prepare)
        try:
            while not isinstance(update := await self._next_update(queued), JobEnd):
                yield update
            if update.error is not None:
                raise update.error
        finally:
            self._abandon(queued)

    async def call(self, key: TurnKey, steps: Callable[[], Steps[T]]) -> T:
        """Run a short job, and return its result. The calls of an owner run one after the other.

        Raises:
            QueueFull, ShuttingDown: the call is not accepted.
            Exception: whatever the job raises.
        """
        return await self._result(key, lambda publish, prepared: steps(), None)  # type: ignore[return-value]

    async def call_on_host(self, key: TurnKey, function: Callable[[], T]) -> T:
        """The same for a function that needs no device: it waits for no step of another job.

        Raises:
            QueueFull, ShuttingDown: the call is not accepted.
            Exception: whatever the function raises.
        """
        return await self._result(key, None, function)  # type: ignore[return-value]

    async def _result(self, key: TurnKey, job: Job | None, prepare: Callable[[], Any] | None) -> object:
        queued = self._submit(key, job, self._calls, prepare)
        try:
            end = await self._next_update(queued)
            assert isinstance(end, JobEnd)
            if end.error is not None:
                raise end.error
            return end.value
        finally:
            self._abandon(queued)

    def _submit(
        self, key: TurnKey, job: Job | None, limit: FairLimit[QueuedJob], prepare: Callable[[], Any] | None
    ) -> QueuedJob:
        host_call = None if prepare is None else HostCall(prepare)
        queued = QueuedJob(key, job, limit, asyncio.get_running_loop(), host_call)
        with self._changed:
            if self._is_closing:
                raise ShuttingDown("the server is shutting down: try again in a moment")
            num_waiting = sum(limit.waiting.count(queued.owner) for limit in (self._streams, self._calls))
            if num_waiting >= self._max_queued:
                raise QueueFull(
                    f"{num_waiting} requests of this key are waiting: send fewer at once, or try again later"
                )
            self._num_jobs += 1
            limit.waiting.push(key, queued)
            self._admit(limit)
        return queued

    async def _next_update(self, job: QueuedJob) -> object:
        update = await job.updates.get()
        with self._changed:
            job.num_read += 1
            if job in self._blocked:
                self._resume(job)
        return update

    def _abandon(self, job: QueuedJob) -> None:
        """The client has gone. A job that has started is closed at its next step."""
        with self._changed:
            job.is_cancelled = True
            was_waiting = job.limit.waiting.discard(job.key, job)
            if was_waiting and job not in self._parked:
                self._num_jobs -= 1
            elif was_waiting or job in self._blocked or self._host_queue.discard(job.key, job):
                self._resume(job)
            self._changed.notify_all()

    # The methods from here to close() are called with the lock held

    def _admit(self, limit: FairLimit[QueuedJob]) -> None:
        for job in limit.admit():
            self._parked.pop(job, None)
            if job.host_call is None:
                self._put_in_line(job)
            else:
                self._host_queue.push(job.key, job)
        self._changed.notify_all()

    def _resume(self, job: QueuedJob) -> None:
        """Give the job its next step, as soon as its client has read enough and the job is active."""
        is_behind = job.num_unread > MAX_UNREAD
        if is_behind and not job.is_cancelled and not self._is_closing:
            self._blocked.add(job)
            if job not in self._parked:
                self._park(job)
            return
        self._blocked.discard(job)
        if job in self._parked and not job.is_cancelled:
            job.limit.waiting.push(job.key, job)
            self._admit(job.limit)
        else:
            self._put_in_line(job)
            self._changed.notify_all()

    def _put_in_line(self, job: QueuedJob) -> None:
        """Let the device thread run the job's next step."""
        if job.awaited is not None and self._together is not None:
            self._awaiting[job] = None
        else:
            self._ready.push(job.key, job)

    def _park(self, job: QueuedJob) -> None:
        """Let another job be active until the client reads again."""
        self._parked[job] = None
        job.limit.release(job.owner)
        parked = [other for other in self._parked if other.owner == job.owner]
        if len(parked) > job.limit.max_active:
            self._end_blocked(next(other for other in parked if other in self._blocked), len(parked))
        self._admit(job.limit)

    def _end_blocked(self, job: QueuedJob, num_unread: int) -> None:
        """Close a job at its next step; its client reads the error after the updates before it."""
        error = AnswerNotRead(
            f"this answer was ended because {num_unread} answers of this key were not read as fast as they came: read "
            "them sooner, or ask for fewer at once"
        )
        job.publish(JobEnd(None, error))
        job.is_cancelled = True
        self._resume(job)

    def _after_step(self, job: QueuedJob, was_last: bool) -> None:
        if was_last:
            self._num_jobs -= 1
            if job in self._parked:
                del self._parked[job]
            else:
                job.limit.release(job.owner)
            self._admit(job.limit)
        elif job.host_call is not None and not job.is_cancelled:
            self._host_queue.push(job.key, job)
            self._changed.notify_all()
        else:
            self._resume(job)

    @property
    def _is_done(self) -> bool:
        return self._is_closing and not self._num_jobs

    def _next_host_owner(self) -> str | None:
        return next((owner for owner in self._host_queue.names if owner not in self._host_owners), None)

    def close(self) -> None:
        """Accept no new jobs, finish those whose clients still wait, and end the threads."""
        with self._changed:
            self._is_closing = True
            for job in list(self._blocked):
                self._resume(job)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # The threads

    def _run_device(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) or self._awaiting or self._is_done)
                if not (len(self._ready) or self._awaiting):
                    return
                job = self._ready.pop() if len(self._ready) else None
                awaiting = list(self._awaiting)
            if job is not None:
                self._step(job)
            if awaiting:
                self._step_together(awaiting)

    def _step(self, job: QueuedJob) -> None:
        was_last = job.step()
        with self._changed:
            self._after_step(job, was_last)

    def _step_together(self, jobs: Sequence[QueuedJob]) -> None:
        """Do what these jobs await; each of them that has news then, or has lost its client, makes its step."""
        assert self._together is not None
        wanted = [job for job in jobs if not job.is_cancelled]
        self._together([job.awaited for job in wanted], [job.key for job in wanted])
        for job in jobs:
            if job.is_cancelled or job.awaited is None or job.awaited.has_news:
                with self._changed:
                    del self._awaiting[job]
                self._step(job)

    def _run_host(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next_host_owner() is not None or self._is_done)
                if (owner := self._next_host_owner()) is None:
                    return
                job = self._host_queue.pop(owner)
                self._host_owners.add(owner)
            job.make_host_call()
            was_last = job.needs_no_device and job.step()
            with self._changed:
                self._host_owners.remove(owner)
                self._after_step(job, was_last)
                self._changed.notify_all()
