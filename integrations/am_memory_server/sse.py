"""Streams: server-sent events, and clients that disconnect. Knows nothing of their content."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from am_memory_server.errors import ApiError, as_api_error

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEP_ALIVE_SECONDS = 15.0
CLIENT_CLOSED = 499
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """How one API writes its streams.

    Attributes:
        written: a chunk as an event.
        failure: the end of a stream that fails after its HTTP status was sent.
        end: what follows the last chunk.
    """

    written: Callable[[dict[str, Any]], str]
    failure: Callable[[ApiError], str]
    end: str = ""


async def events(chunks: AsyncGenerator[dict[str, Any], None], form: Form | None = None) -> AsyncIterator[str]:
    """Send each chunk as an event.

    When there is no chunk for a while, a comment keeps proxies from closing the connection.

    Args:
        form: None: that of chat completions, where [DONE] follows the last event, and an error is the last event.
    """
    form = form or CHAT
    async with aclosing(chunks):
        try:
            async for chunk in _kept_alive(chunks):
                yield ": still working\n\n" if chunk is None else form.written(chunk)
        except Exception as error:  # the HTTP status has been sent already
            yield form.failure(as_api_error(error))
            return
    yield form.end


def failure(error: Exception) -> str:
    """The end of a stream that fails after its HTTP status was sent."""
    return f"data: {_json(as_api_error(error).body)}\n\n{DONE}"


def _written(chunk: dict[str, Any]) -> str:
    return f"data: {_json(chunk)}\n\n"


CHAT = Form(_written, failure, DONE)


async def _kept_alive(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[dict[str, Any] | None]:
    """The chunks, and None when there is none for a while."""
    while True:
        waiting = asyncio.ensure_future(anext(chunks, None))
        try:
            while not (await asyncio.wait({waiting}, timeout=KEEP_ALIVE_SECONDS))[0]:
                yield None
            if (chunk := waiting.result()) is None:
                return
            yield chunk
        finally:
            if not waiting.done():
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    await waiting


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def unless_disconnected(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer, and cancel it when the client disconnects.

    Raises:
        ApiError: the client has disconnected.
    """
    working = asyncio.ensure_future(answer)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(CLIENT_CLOSED, "the client closed the connection", code="client_closed")
    finally:
        for task in (working, watching):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
