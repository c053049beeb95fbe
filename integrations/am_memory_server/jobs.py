"""Jobs: generators that work in short steps, so that many of them can share one device thread.

A job publishes updates to its client while it runs. Work that needs no device it hands to host threads. Knows no
thread, no HTTP and no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from am_memory.errors import AMMemoryError
from am_memory_server.fair_queue import FairLimit

T = TypeVar("T")

TurnKey = tuple[str, str]
"""An owner, and a conversation of this owner: jobs take turns between the owners, then between their conversations."""

Publish = Callable[[object], None]
"""Sends an update to the client of a job. Any thread may call it."""


@dataclass(frozen=True)
class HostCall:
    """A function that a job wants to have called on a host thread, because it needs no device and may take long."""

    function: Callable[[], Any]


class Awaited(Protocol):
    """Work of a job that is done together with that of other jobs, such as the next token of an answer."""

    @property
    def is_ready(self) -> bool:
        """Whether it is done, so that the job's next step need not do it."""
        ...

    @property
    def has_news(self) -> bool:
        """Whether the job's next step has anything to do: it is done, or there are events to publish."""
        ...


Steps = Generator[HostCall | Awaited | None, Any, T]
"""A job that has started. Other jobs get their turns wherever it yields."""

Job = Callable[[Publish, Any], Steps[object]]
"""Starts a job, with the function that publishes its updates and with the result of its preparation."""


def on_host(function: Callable[[], T]) -> Generator[HostCall, Any, T]:
    """Call a function on a host thread, from within a job: `result = yield from on_host(function)`."""
    result: T = yield HostCall(function)
    return result


class QueueFull(AMMemoryError):
    """Too many requests of one owner are waiting."""


class ShuttingDown(AMMemoryError):
    """The server takes no new requests."""


class AnswerNotRead(AMMemoryError):
    """The client does not read its answer, and its owner has too many of these."""


@dataclass(frozen=True)
class JobEnd:
    """The last update of every job: its result, or the error that it raised."""

    value: object
    error: Exception | None


@dataclass(eq=False)
class QueuedJob:
    """A job with its client's updates, from its arrival to its end.

    Attributes:
        start: starts the steps; None: the job is its preparation alone.
        limit: decides when the job becomes active.
        host_call: to be made before the next step; the preparation comes first.
        awaited: to be done before the next step, together with that of other jobs.
    """

    key: TurnKey
    start: Job | None
    limit: FairLimit[QueuedJob]
    loop: asyncio.AbstractEventLoop
    host_call: HostCall | None = None
    awaited: Awaited | None = None
    updates: asyncio.Queue[object] = field(default_factory=asyncio.Queue)
    num_published: int = 0
    num_read: int = 0
    is_cancelled: bool = False
    steps: Steps[object] | None = None
    _result: object = None  # of the last host call
    _error: Exception | None = None

    @property
    def owner(self) -> str:
        """The owner of the job."""
        return self.key[0]

    @property
    def num_unread(self) -> int:
        """Updates that the client has not read yet."""
        return self.num_published - self.num_read

    @property
    def needs_no_device(self) -> bool:
        """Whether the job can end without a step on the device: its preparation is all there is, or has failed."""
        return self.steps is None and (self.start is None or self._error is not None)

    def publish(self, update: object) -> None:
        """Send an update to the client, unless it has gone."""
        if not self.is_cancelled and not self.loop.is_closed():
            self.num_published += 1
            self.loop.call_soon_threadsafe(self.updates.put_nowait, update)

    def step(self) -> bool:
        """Run one step.

        Returns:
            Whether it was the last one. If not, `host_call` or `awaited` may be set.
        """
        self.awaited = None
        result, error, self._result, self._error = self._result, self._error, None, None
        try:
            if self.steps is None:
                if error is not None or self.start is None:
                    self.publish(JobEnd(result, error))
                    return True
                self.steps, result = self.start(self.publish, result), None
            if self.is_cancelled:
                self.steps.close()
                return True
            needed = self.steps.send(result) if error is None else self.steps.throw(error)
            if isinstance(needed, HostCall):
                self.host_call = needed
            else:
                self.awaited = needed
            return False
        except StopIteration as stop:
            self.publish(JobEnd(stop.value, None))
        except Exception as raised:  # of any kind: it is raised again where the client waits
            self.publish(JobEnd(None, raised))
        return True

    def make_host_call(self) -> None:
        """Make the host call; the next step gets its result or its error."""
        call, self.host_call = self.host_call, None
        assert call is not None
        try:
            self._result = call.function()
        except Exception as error:  # of any kind: the next step raises it in the job
            self._error = error
