"""Who may call, and with how much: API keys, the machine that is asked for, the size of a request.

An owner stands for an API key: a digest of it, which names all that belongs to its conversations.
"""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from am_memory_server.errors import ApiError
from am_memory_server.settings import ServerSettings

ANONYMOUS = "anonymous"
LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}

bearer = HTTPBearer(auto_error=False, description="An API key of the server, where it has any.")


def owner_of_key(key: str) -> str:
    """The digest that stands for a key."""
    return sha256(f"am_memory.server {key}".encode("utf-8", "replace")).hexdigest()[:16]


async def owner_of(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
) -> str:
    """Whose request it is.

    Raises:
        ApiError: 401 without a right key; 403 for a page that had a browser call this machine under another name.
    """
    settings: ServerSettings = request.app.state.service.settings
    if not settings.api_keys:
        if settings.is_loopback and _host_name(request) not in LOOPBACK_NAMES:
            raise ApiError(
                403,
                f"this server answers to {', '.join(sorted(LOOPBACK_NAMES))} alone, not to "
                f"{request.headers.get('host', '')!r}: ask for one of those, or start it with --api-key",
                code="wrong_host",
            )
        return ANONYMOUS
    owner = owner_of_key(credentials.credentials) if credentials is not None else ""
    # Digests are compared, so that the time which this takes says nothing of a key.
    if not any(hmac.compare_digest(owner, owner_of_key(key)) for key in settings.api_keys):
        problem = "this is none of the server's API keys" if owner else "an API key is needed"
        raise ApiError(401, f"{problem}: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
    return owner


Owner = Annotated[str, Depends(owner_of)]


def _host_name(request: Request) -> str:
    host = request.headers.get("host", "")
    return host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: it is larger than that.
        ClientDisconnect: the client went away before its end.
    """
    body, has_more = bytearray(), True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise ApiError(413, f"the request is larger than {max_bytes} bytes: send less", code="request_too_large")
    return bytes(body)


class BodyLimit:
    """Reads the body of a request before anybody else, up to a limit."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await read_body(receive, self.max_bytes)
        except ClientDisconnect:
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, send)
