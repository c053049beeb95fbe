"""Work of one session in steps, which a `Batch` may make together with the steps of other sessions.

A step that was made with others is kept until it is asked for. Knows no tokens and no prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from am_memory.events import Event
from am_memory.session.context import Context
from am_memory.session.shared import Shared
from am_memory.session.transaction import Before, Restorable, Transaction

T = TypeVar("T")


@dataclass(frozen=True)
class _Made(Generic[T]):
    """The result of a step that is not given out yet: an item, or the error that ended the work."""

    item: T | None
    error: Exception | None
    before: Before | None


class Stepwise(ABC, Generic[T]):
    """An iterator that works in steps, and gives an item for each.

    Attributes:
        shared: what the sessions of the memory share.
        context: the conversation.
        is_finished: nothing more is made: the work is complete, has failed, or was closed.
        error: why it has failed; None: it has not.
        unsent: events of steps that were made together with others.
    """

    shared: Shared
    context: Context

    def _begin(self, shared: Shared, context: Context) -> None:
        self.shared, self.context, self.is_finished = shared, context, False
        self.error: Exception | None = None
        self.unsent: list[Event] = []
        self._made: _Made[T] | None = None

    @property
    def name(self) -> str:
        """The name of its session."""
        return self.context.name

    @abstractmethod
    def _step(self) -> T:
        """Make the next step alone. The engine is held, and a transaction has begun."""

    @property
    def most_new_tokens(self) -> int:
        """How many tokens the work may add to the conversation."""
        return 0

    @property
    def _changed_too(self) -> tuple[Restorable, ...]:
        """What a step changes besides the context."""
        return ()

    @property
    def _can_take_back(self) -> bool:
        """Whether a step that was not asked for can still be undone."""
        return True

    def __next__(self) -> T:
        if self._made is not None:
            return self._take()
        if self.is_finished:
            raise StopIteration
        try:
            with self.shared.engine_lock, self.transaction():
                return self._step()
        except BaseException as error:
            self.is_finished, self.error = True, error if isinstance(error, Exception) else None
            raise

    def transaction(self) -> Transaction:
        """A `with` block in which one step is made, or nothing changes."""
        return self.context.transaction(*self._changed_too)

    def close(self) -> None:
        """End it. A step that was made already, and was not asked for, is taken back.

        The listeners get the events that they have not got yet. Any thread may call it; it waits for the end of a step
        that is being made.
        """
        self._end()
        events = list(self.unsent)
        del self.unsent[: len(events)]
        for event in events:
            self.context.notify(event)

    def _end(self) -> None:
        if self.is_finished and self._made is None:
            return
        with self.shared.engine_lock:
            self.is_finished = True
            if (made := self._made) is not None and made.before is not None and self._can_take_back:
                made.before.put_back(self.context, self._changed_too)
            self._made = None

    # A step that was made together with others

    @property
    def is_ready(self) -> bool:
        """Whether `next` returns at once, or raises."""
        return self._made is not None

    @property
    def has_news(self) -> bool:
        """Whether its caller has anything to do: to call `next` or `send_events`."""
        return self._made is not None or bool(self.unsent)

    def keep(self, item: T, before: Before | None) -> None:
        """Keep an item until it is asked for.

        Args:
            before: the context before the step; None: the step is not taken back.
        """
        self._made = _Made(item, None, before)

    def fail(self, error: Exception) -> None:
        """End the work; `next` raises the error."""
        self._made, self.is_finished = _Made(None, error, None), True

    def interrupt(self) -> None:
        """End the work without the item of a step that was undone."""
        self._made, self.is_finished = None, True

    def send_events(self) -> None:
        """Give the events of steps that were made together with others to the listeners.

        If a listener raises, the work fails, and an item that was not asked for is taken back.
        """
        try:
            while self.unsent:
                self.context.notify(self.unsent.pop(0))
        except Exception as error:  # of any kind: it is raised again where the work is waited for
            self._end()
            self.fail(error)

    def _take(self) -> T:
        self.send_events()
        made, self._made = self._made, None
        if made is None:  # a listener closed it
            raise StopIteration
        if made.error is not None:
            self.error = made.error
            raise made.error
        assert made.item is not None
        return made.item
