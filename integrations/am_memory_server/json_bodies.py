"""Request bodies as strict JSON, and an estimate of their size in memory before they are parsed. Knows no endpoint.

Python's own parser accepts NaN, lone surrogates and lists nested until the stack overflows. pydantic's refuses all of
these, and nests 200 levels at most.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from am_memory_server.bodies import watching_names

PLACE = re.compile(r"(.*) at line (\d+) column (\d+)")
"""How the parser says what is wrong, and where."""


def num_values(body: bytes, enough: int) -> int:
    """Estimate how many names and values a body has; above `enough`, the result is a lower bound.

    A parsed value can take a hundred times the two bytes of `[]`. So nothing is parsed here: the body is searched in C.
    """
    if (found := _num_marks(body)) <= enough:
        return found
    body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (found := body.count(b'"') // 2) > enough:
        return found
    return _num_marks(b"".join(body.split(b'"')[::2]))  # without the texts


def _num_marks(text: bytes) -> int:
    return 1 + sum(map(text.count, (b"[", b"{", b",", b":")))


class JSONRequest(Request):
    """A request whose body pydantic parses."""

    async def json(self) -> Any:
        """The body.

        Raises:
            JSONDecodeError: the body is not JSON, or is nested too deep.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(PLACE.sub(r"line \2, column \3: \1", str(error)), "", 0) from error


class JSONRoute(APIRoute):
    """A route that takes `JSONRequest`. A header of its response names what the server did not know in the body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            with watching_names(is_strict=request.app.state.service.settings.strict) as names:
                response = await handle(JSONRequest(request.scope, request.receive))
            response.headers.update(names.headers)
            return response

        return handled
