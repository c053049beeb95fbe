"""Limits for connections: how many there are, and how long one may be idle.

uvicorn limits the head of a request, and buffers little. But it never closes a connection that sends no request, sends
a head byte by byte, or does not read its answer.
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
    """The class of a server's connections, for uvicorn."""

    class Bounded(BoundedConnection):
        max_connections = settings.max_connections
        idle_seconds = settings.idle_seconds

    return Bounded


class BoundedConnection(H11Protocol):
    """A connection that is closed when its client is idle.

    The client is idle until the whole head of a request has arrived, and while it does not read what was sent. The time
    between the two is the application's.

    Attributes:
        max_connections: one more closes the oldest idle one; if none is idle, the new one gets a 503.
        idle_seconds: how long the client may be idle.
    """

    max_connections: int
    idle_seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: Any = None
        self._idle_since = 0.0
        self._num_unsent = 0

    @property
    def has_request(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.has_request and not self.flow.write_paused:
            self._stop_timer()

    def on_response_complete(self) -> None:
        self._start_timer()  # first, because uvicorn may begin the next request at once
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.has_request:
            self._stop_timer()

    def _make_room(self) -> None:
        others = [one for one in self.connections if isinstance(one, BoundedConnection) and one is not self]
        living = [one for one in others if not one.transport.is_closing()]
        if len(living) < self.max_connections:
            return
        if idle := [one for one in living if not one.has_request]:
            min(idle, key=lambda one: one._idle_since).transport.abort()
        else:
            self.app = too_many_connections

    def _start_timer(self) -> None:
        self._stop_timer()
        self._idle_since = monotonic()  # the loop's own clock stands still within one iteration
        self._num_unsent = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.idle_seconds, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        """Close the connection, unless the client has read something meanwhile."""
        if 0 < self.transport.get_write_buffer_size() < self._num_unsent:
            self._start_timer()
        else:
            self.transport.abort()


async def too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers every request with a 503."""
    if scope["type"] == "http":
        error = ApiError(
            503, "there are too many connections: try again in a moment", type="server_error", code="overloaded"
        )
        response = error.response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)
