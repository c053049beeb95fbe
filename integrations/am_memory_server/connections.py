"""Connections that cost little: how many there are, and how long one may keep still.

uvicorn bounds the head of a request, and reads and writes no more than is taken. It does not give up a connection that
never asks for anything, sends a head byte by byte, or never reads its answer.
"""

from __future__ import annotations

from asyncio import Transport
from time import monotonic
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from am_memory_server.errors import ApiError
from am_memory_server.settings import ServerSettings


def connections_of(settings: ServerSettings) -> type[H11Protocol]:
    """The class of a server's connections, as uvicorn takes it."""

    class Bounded(BoundedConnection):
        max_connections = settings.max_connections
        idle_seconds = settings.idle_seconds

    return Bounded


class BoundedConnection(H11Protocol):
    """A connection that is ended when its client keeps still.

    It waits while no request is under way (until the whole head of one is there), and while its client does not take
    what was sent: in between, the time is the application's.

    Attributes:
        max_connections: one more ends the oldest one that has no request under way; where there is none, it is told to
            come back.
        idle_seconds: that it may wait.
    """

    max_connections: int
    idle_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: Any = None
        self._waiting_since = 0.0
        self._num_unsent = 0

    @property
    def has_request(self) -> bool:
        """Whether a request is being read or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._go_on()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.has_request and not self.flow.write_paused:
            self._go_on()

    def on_response_complete(self) -> None:
        self._wait()  # first: uvicorn may find the next request there already
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.has_request:
            self._go_on()

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, BoundedConnection) and one is not self]
        living = [one for one in others if not one.transport.is_closing()]
        if len(living) < self.max_connections:
            return
        if idle := [one for one in living if not one.has_request]:
            min(idle, key=lambda one: one._waiting_since).transport.abort()
        else:
            self.app = too_many_connections

    def _wait(self) -> None:
        self._go_on()
        self._waiting_since = monotonic()  # a loop's own time stands still within one of its rounds
        self._num_unsent = self.transport.get_write_buffer_size()
        self._waiting = self.loop.call_later(self.idle_seconds, self._look)

    def _go_on(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _look(self) -> None:
        """End what keeps still; a client that takes what was sent, however slowly, may go on."""
        if 0 < self.transport.get_write_buffer_size() < self._num_unsent:
            self._wait()
        else:
            self.transport.abort()


async def too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that has no room."""
    if scope["type"] == "http":
        error = ApiError(503, "there are too many connections: try again", type="server_error", code="overloaded")
        response = error.response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)
