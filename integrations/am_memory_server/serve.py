"""Runs the application with uvicorn. On shutdown, running answers have time to finish."""

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
    """Prepare the memory, so that no client waits for that, and serve until SIGINT or SIGTERM."""
    memory.prepare()
    sys.setswitchinterval(SWITCH_SECONDS)
    uvicorn.Server(uvicorn_config(create_app(memory, settings), settings)).run()


def uvicorn_config(app: ASGIApp, settings: ServerSettings, *, log_level: str = "info") -> uvicorn.Config:
    """The configuration of uvicorn, with limits for all that a client may send, hold open or leave unread."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=log_level,
        server_header=False,
        http=connections_of(settings),  # based on h11: the parser in C does not limit the headers
        ws="none",  # not used, and WebSocket connections would not be counted
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
