"""The worker thread of a memory, on which asynchronous calls run, so that no event loop waits for the device.

Calls that generate at the same time get their tokens together: one forward pass makes a token of each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from threading import Condition, Lock, Thread
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from am_memory import Memory
from am_memory.session.batch import Batch
from am_memory.session.stepwise import Stepwise

T = TypeVar("T")
Steps = Generator[T | tuple[Stepwise[Any], ...], None, None]
"""The results of a call, and between them what is to be read or generated next. No result is a tuple."""

MAX_UNREAD = 2
"""Results that a call makes ahead of its reader, so that it does not miss the next pass with the others."""

_workers: WeakKeyDictionary[Memory, Worker] = WeakKeyDictionary()
_starting = Lock()


def worker_of(memory: Memory) -> Worker:
    """The memory's worker: one thread, as the engine does one thing at a time."""
    with _starting:
        if memory not in _workers:
            _workers[memory] = Worker()
        return _workers[memory]


@dataclass(frozen=True)
class _End:
    """The last result of every call: the error that it raised, or None."""

    error: Exception | None


@dataclass(eq=False)
class _Call(Generic[T]):
    """One call, from its arrival to its end."""

    steps: Steps[T]
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[T | _End] = field(default_factory=asyncio.Queue)
    awaited: tuple[Stepwise[Any], ...] = ()
    num_made: int = 0
    num_read: int = 0
    is_closed: bool = False

    @property
    def has_gone(self) -> bool:
        """Whether nobody reads the results any more; a loop that is closed runs no code that would say so."""
        return self.is_closed or self.loop.is_closed()

    @property
    def can_go_on(self) -> bool:
        """Whether its reader is not far behind, or has gone."""
        return self.has_gone or self.num_made - self.num_read < MAX_UNREAD

    @property
    def is_awaiting(self) -> bool:
        """Whether it waits for a step that is made together with others'."""
        return bool(self.awaited) and not any(step.is_ready for step in self.awaited)

    def step(self) -> bool:
        """Run one step; False if it was the last one."""
        self.awaited = ()
        try:
            if self.has_gone:
                self.steps.close()
                return False
            result = next(self.steps)
        except StopIteration:
            self._put(_End(None))
            return False
        except Exception as error:  # of any kind: it is raised again where the caller waits
            self._put(_End(error))
            return False
        if isinstance(result, tuple):
            self.awaited = result
        else:
            self._put(result)
        return True

    def _put(self, result: T | _End) -> None:
        self.num_made += 1
        if self.is_closed:
            return
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the loop was closed
            self.is_closed = True


class Worker:
    """One thread that runs the steps of several calls in turn; it ends while there are none."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._calls: list[_Call[object]] = []
        self._is_running = False
        self._batch = Batch()

    async def results(self, steps: Steps[T]) -> AsyncGenerator[T, None]:
        """The results of a call. It ends when nobody iterates any more."""
        call = _Call(steps, asyncio.get_running_loop())
        self._start(call)
        try:
            while True:
                result = await call.results.get()
                with self._changed:
                    call.num_read += 1
                    self._changed.notify()
                if isinstance(result, _End):
                    if result.error is not None:
                        raise result.error
                    return
                yield result
        finally:
            with self._changed:
                call.is_closed = True
                self._changed.notify()

    def _start(self, call: _Call[T]) -> None:
        with self._changed:
            self._calls.append(call)  # type: ignore[arg-type]  # its results go to its own caller
            if not self._is_running:
                self._is_running = True
                Thread(target=self._run, name="am_memory", daemon=True).start()
            self._changed.notify()

    def _able(self) -> list[_Call[object]]:
        """The calls that can go on now."""
        return [call for call in self._calls if call.can_go_on]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._able() or not self._calls)
                if not self._calls:
                    self._is_running = False
                    return
                able = self._able()
            for call in able:
                if call.is_awaiting and not call.has_gone:
                    for step in call.awaited:
                        step.send_events()
                elif not call.step():
                    with self._changed:
                        self._calls.remove(call)
            self._batch.step([step for call in able for step in call.awaited])
