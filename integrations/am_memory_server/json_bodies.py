"""Bodies of requests as JSON, and nothing that is none. Knows no endpoint.

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
