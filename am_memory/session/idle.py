"""The idle worker: one thread of a memory, which refines segments while no session works.

It computes without the engine's lock, on caches of its own, as a compaction in the background does. A step of a session
therefore never waits for it. As soon as it sees a step, it gives up what it was doing. It takes the lock for a moment
only: to read what a refinement needs, and to swap the result in. While nothing is left to refine, it sleeps.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING

from am_memory.compaction.refinement import Refinement
from am_memory.errors import AMMemoryError, OriginalLost
from am_memory.session import refining
from am_memory.session.recalling import forget_lost_originals

if TYPE_CHECKING:
    from am_memory import events
    from am_memory.events import Listener
    from am_memory.session.context import Context
    from am_memory.session.shared import Shared

IDLE_SECONDS = 1.0
"""The worker begins when no session has worked for so long."""
LOOKS = 10
"""The worker looks so often in this time whether a session works."""

logger = logging.getLogger("am_memory")


class _StepSeenError(Exception):
    """A session works, or the memory is closing: the refinement is given up."""


class IdleWorker:
    """Refines the segments of a memory's named sessions whose policy asks for it. Its thread starts when one does.

    Args:
        shared: of the memory. The worker does not keep it alive, and ends with it.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = weakref.ref(shared)
        self._engine_lock = shared.engine_lock
        self._names: dict[str, None] = {}  # sessions that may have something to refine, the last one first in line
        self._is_asked, self._is_closing = Event(), Event()
        self._thread: Thread | None = None
        self._starting = Lock()

    def ask(self, name: str) -> None:
        """Refine what is left of a session, before all others; nothing happens unless its policy asks for it."""
        shared = self._shared()
        session = None if shared is None else shared.sessions.get(name)
        if shared is None or session is None or session.policy.refine != "idle":
            return
        self._names.pop(name, None)
        self._names[name] = None
        self._is_asked.set()
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                if self._thread is None:
                    weakref.finalize(shared, self.close)  # also at the end of the program
                self._thread = Thread(target=self._run, name="am-memory-idle", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread; it stops after the forward pass, or the batch of fits, that it is in."""
        self._is_closing.set()
        self._is_asked.set()
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._is_asked.wait()
            self._is_asked.clear()
            while not self._is_closing.is_set() and self._refine_when_idle():
                pass
            if self._is_closing.is_set():
                return

    def _refine_when_idle(self) -> bool:
        """Refine a segment, unless a session works; whether anything may be left."""
        for _ in range(LOOKS):
            if self._is_closing.wait(IDLE_SECONDS / LOOKS) or self._sees_step():
                return True
        shared = self._shared()
        return shared is not None and self._refine_next(shared)

    def _sees_step(self) -> bool:
        """Whether a session works at this moment."""
        if not self._engine_lock.acquire(blocking=False):
            return True
        self._engine_lock.release()
        return False

    def _give_up_if_seen(self, stage: str, done: int, total: int) -> None:
        """The progress of a refinement."""
        if self._is_closing.is_set() or self._sees_step():
            raise _StepSeenError

    def _refine_next(self, shared: Shared) -> bool:
        """Refine the segment that is next in line; False if there is none."""
        for name in reversed([*self._names]):
            session = shared.sessions.get(name)
            self._names.pop(name, None)  # before it is refined: a step meanwhile puts it in line again
            if session is not None and session.policy.refine == "idle" and self._refine(session._context):
                self._names.setdefault(name)
                return True
        return False

    def _refine(self, context: Context) -> bool:
        """Refine a segment of one session; False if none can be refined."""
        try:
            with self._step(context):
                if (running := context.background_compaction) is not None:
                    if running.is_done:
                        context.compact()
                    return True
                forget_lost_originals(context)
                if (segment := refining.next_segment(context)) is None:
                    return False
                planned = refining.plan_refinement(context, segment)
            self._run_and_swap_in(context, planned)
        except (_StepSeenError, OriginalLost):  # those that are lost are forgotten next time
            pass
        except AMMemoryError as error:
            logger.warning("session %r: a segment cannot be refined: %s", context.name, error)
            return False
        return True

    def _run_and_swap_in(self, context: Context, planned: Refinement) -> None:
        result = planned.run(self._give_up_if_seen)
        with self._step(context):
            # one in the background began before the new slots: it is swapped in first, and then this begins again
            if context.background_compaction is None and refining.is_current(context, planned):
                refining.swap_in(context, planned, result)

    @contextmanager
    def _step(self, context: Context) -> Iterator[None]:
        """A step on a context, under the engine's lock.

        Its events are emitted when the lock is free again: a listener may wait for a thread that waits for the lock.
        """
        while not self._engine_lock.acquire(timeout=IDLE_SECONDS / LOOKS):  # a session has begun to work just now
            if self._is_closing.is_set():
                raise _StepSeenError
        emitted: list[events.Event] = []
        notify = context.notify
        context.notify = emitted.append
        try:
            with context.transaction():
                yield
        finally:
            context.notify = notify
            self._engine_lock.release()
            for event in emitted:
                _notify_or_warn(notify, event)


def _notify_or_warn(notify: Listener, event: events.Event) -> None:
    """Call a listener. What it raises has no caller to go to, so it is logged, and the worker goes on."""
    try:
        notify(event)
    except Exception:
        logger.exception("a listener failed on %r, in the thread that refines while no session works", event)
