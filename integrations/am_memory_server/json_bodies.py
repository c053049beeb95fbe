"""Bodies of requests as JSON, and nothing that is none; how much they become, before they do. Knows no endpoint.

Python's own reader takes NaN, halves of surrogate pairs, which no text holds, and lists within lists until the stack
ends. pydantic's takes none of these, and nests no deeper than 200.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json


def num_values(body: bytes, enough: int) -> int:
    """How many names and values a body has, nearly; once that is more than `enough`, so many at least.

    Searches in C alone, each of the whole body: a value is a hundred times as large as the two bytes that say `[]`, and
    what is counted is not made.
    """
    if (found := _num_marks(body)) <= enough:
        return found
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (found := body.count(b'"') // 2) > enough:
        return found
    return _num_marks(b"".join(body.split(b'"')[::2]))  # without what is text


def _num_marks(text: bytes) -> int:
    return 1 + sum(map(text.count, (b"[", b"{", b",", b":")))


class JSONRequest(Request):
    """A request that is read by pydantic."""

    async def json(self) -> Any:
        """The body.

        Raises:
            JSONDecodeError: it is no JSON, or nests too deep.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class JSONRoute(APIRoute):
    """A route whose requests are read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return handled
