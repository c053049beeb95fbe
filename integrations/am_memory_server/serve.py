"""Runs the application with uvicorn until it is told to stop; what is being answered then may come to its end."""

from __future__ import annotations

import math
import sys

import uvicorn
from starlette.types import ASGIApp

from am_memory.memory import Memory
from am_memory_server.app import create_app
from am_memory_server.connections import connections_of
from am_memory_server.scheduler import SWITCH_SECONDS
from am_memory_server.settings import ServerSettings

MAX_HEAD_BYTES = 16 * 2**10


def serve(memory: Memory, settings: ServerSettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    sys.setswitchinterval(SWITCH_SECONDS)
    uvicorn.Server(configured(create_app(memory, settings), settings)).run()


def configured(app: ASGIApp, settings: ServerSettings, *, log_level: str = "info") -> uvicorn.Config:
    """How uvicorn runs the application: with a bound for all that a client may send, hold open or leave unread."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=log_level,
        server_header=False,
        http=connections_of(settings),  # on h11: the parser in C would keep headers without a bound
        ws="none",  # nothing here speaks it, and its connections would be counted nowhere
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
