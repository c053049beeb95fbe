"""The ASGI application: puts the endpoints, errors, limits and the chat page together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from am_memory.memory import Memory
from am_memory_server import (
    chat_completions,
    completions,
    errors,
    memory_endpoints,
    metrics,
    responses,
    text_endpoints,
    token_endpoints,
)
from am_memory_server.access import Gate, Operator, Owner
from am_memory_server.requests import require_model
from am_memory_server.response_schemas import ErrorResponse, ModelCard, ModelList
from am_memory_server.service import Service
from am_memory_server.settings import ServerSettings

STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "Invalid request",
        401: "No valid API key",
        403: "Wrong host name, or a key that is not for this endpoint",
        404: "Unknown model or session",
        408: "The body took too long to arrive, or the answer was not read",
        409: "Not possible in the current state",
        413: "The request is too large",
        415: "The body is not JSON",
        429: "Too many requests are waiting",
        503: "Not available now; try again",
    }.items()
}


def create_app(memory: Memory, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that serves one memory.

    Args:
        memory: if it has a store, conversations outlive the application.
        settings: None: the defaults, for clients on this machine only.
    """
    service = Service(memory, settings or ServerSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.scheduler.close()

    app = FastAPI(
        title="am-memory",
        description="OpenAI's API on a local model with unbounded history: its KV cache is compacted again and again.",
        version=version("attention-matching-memory"),
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        responses=ERRORS,
    )
    app.state.service = service
    errors.install(app)
    for module in (chat_completions, responses, completions, token_endpoints, memory_endpoints, text_endpoints):
        app.include_router(module.router)
    _add_status(app, service)
    _add_page(app)
    app.add_middleware(Gate, settings=service.settings)
    app.add_middleware(metrics.CountRequests, metrics=service.metrics)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(service.settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_status(app: FastAPI, service: Service) -> None:
    model = ModelCard(id=service.settings.model_name, created=service.created)

    @app.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def list_models(owner: Owner) -> Any:
        """List the served model: there is one."""
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
    async def get_model(name: str, owner: Owner) -> Any:
        """Show a model by its name."""
        require_model(service.settings, name)
        return model

    @app.post("/v1/embeddings", include_in_schema=False)
    async def refuse_embeddings(owner: Owner) -> Any:
        raise errors.ApiError(
            404,
            "this server runs a chat model and makes no embeddings: set another server for them in the client",
            code="embeddings_not_supported",
        )

    @app.get("/metrics", tags=["Status"], response_class=Response)
    async def get_metrics(operator: Operator) -> Response:
        """Metrics of all keys together, for Prometheus. Needs an operator's key if the server has any keys."""
        return Response(await asyncio.to_thread(service.metrics.text), media_type=metrics.MEDIA_TYPE)

    @app.get("/health", tags=["Status"])
    async def health() -> JSONResponse:
        """Whether the server accepts requests."""
        is_closing = service.scheduler.is_closing
        return JSONResponse({"status": "closing" if is_closing else "ok"}, 503 if is_closing else 200)


def _add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)
