"""An OpenAI-compatible web server on `am_memory`, and its chat page: `attention-matching-memory[server]`."""

from am_memory.errors import how_to_install

try:
    from am_memory_server.app import create_app
    from am_memory_server.settings import ServerSettings
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
        raise
    needed = f"am_memory_server needs {error.name}: {how_to_install('server')}"
    raise ModuleNotFoundError(needed, name=error.name) from error

__all__ = ["ServerSettings", "create_app"]
