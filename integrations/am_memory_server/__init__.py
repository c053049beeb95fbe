"""An OpenAI-compatible web server on `am_memory`, and its chat page: `attention-matching-memory[server]`."""

from am_memory_server.app import create_app
from am_memory_server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
