"""Runs the application with uvicorn until it is told to stop; what is being answered then may come to its end."""

from __future__ import annotations

import math

import uvicorn

from am_memory.memory import Memory
from am_memory_server.app import create_app
from am_memory_server.settings import ServerSettings


def serve(memory: Memory, settings: ServerSettings) -> None:
    """Serve until SIGINT or SIGTERM."""
    uvicorn.run(
        create_app(memory, settings),
        host=settings.host,
        port=settings.port,
        log_level="info",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
    )
