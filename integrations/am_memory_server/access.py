"""Access: API keys, host names, and the size and time of request bodies.

Everything is checked on the head of a request, before its body is read. An owner is the digest of an API key; all
conversations of a key carry its owner's name.
"""

from __future__ import annotations

import hmac
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

import anyio
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from am_memory_server.errors import ApiError
from am_memory_server.json_bodies import num_values
from am_memory_server.settings import ServerSettings, is_loopback_name

ANONYMOUS = "anonymous"
OPEN_PATHS = ("/", "/health", "/openapi.json")
OPEN_FOLDER = "/static/"
"""Paths that need no key. All others do if the server has keys, so that a forgotten path is closed."""
JSON_TYPE = re.compile(r"application/([^/;\s]+\+)?json", re.IGNORECASE)

bearer = HTTPBearer(auto_error=False, description="An API key, if the server has any.")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        owner: owner of the conversations; None for an operator's key, which opens the metrics only.
        is_operator: may read the metrics of all owners.
    """

    owner: str | None
    is_operator: bool


def owner_of_key(key: str) -> str:
    """The digest of a key."""
    return sha256(f"am_memory.server {key}".encode("utf-8", "replace")).hexdigest()[:16]


def owner_of_headers(headers: Mapping[str, str]) -> str | None:
    """The digest of the key in a request, valid or not; None if there is no key."""
    scheme, key = get_authorization_scheme_param(headers.get("authorization"))
    return owner_of_key(key) if scheme.lower() == "bearer" and key else None


class Gate:
    """Middleware that checks the head of a request, then reads its body within limits of size and time."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app, self._admission = app, Admission(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with self._admission.body_of(scope, receive) as body:
                await self.app(scope, _replayed(body, receive), send)
        except ClientDisconnect:
            return
        except ApiError as error:  # of the gate; the application answers its own errors
            await error.response()(scope, receive, send)


class Admission:
    """Decides who may send a request, and how large it may be. Sends no response."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._owners = [owner_of_key(key) for key in settings.api_keys]
        self._operators = [owner_of_key(key) for key in settings.operator_keys]
        self._pending = PendingBytes(settings.max_pending_bytes, settings.max_key_pending_bytes)

    @asynccontextmanager
    async def body_of(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """Check a request and read its body, which counts as the caller's until the end of the block.

        The body is read for POST only. The caller is written to `scope["state"]`.

        Raises:
            ApiError: the request is not allowed, or its body is not JSON, too large, too slow, or has too many values.
            ClientDisconnect: the client went away before the end of the body.
        """
        if _is_open(scope["path"]):
            yield b""
            return
        headers = Headers(scope=scope)
        caller = scope.setdefault("state", {})["caller"] = self.caller_of(headers)
        if scope["method"] != "POST":
            yield b""
            return
        settings, size = self._settings, headers.get("content-length", "0")
        if size.isdecimal() and int(size) > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        if size.strip("0") or "transfer-encoding" in headers:
            _require_json(headers.get("content-type", ""))
        with self._pending.of(caller.owner or "") as take:
            try:
                with anyio.fail_after(settings.body_seconds):
                    body = await _read(receive, settings.max_body_bytes, take)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {settings.body_seconds:g} s: send it faster, or send less",
                    code="request_timeout",
                ) from None
            _require_few_values(body, settings.max_body_values)
            yield body

    def caller_of(self, headers: Mapping[str, str]) -> Caller:
        """The sender of a request.

        Raises:
            ApiError: 401 without a valid key; 403 for a web page that calls this machine under another name.
        """
        sent = owner_of_headers(headers)
        # Comparing digests in constant time tells nothing of a key.
        is_operator = any(hmac.compare_digest(sent or "", known) for known in self._operators)
        if not self._owners:
            self._require_this_machine(headers.get("host", ""))
            return Caller(ANONYMOUS, is_operator or not self._operators)
        is_owner = any(hmac.compare_digest(sent or "", known) for known in self._owners)
        if not is_owner and not is_operator:
            problem = "this is not one of the server's API keys" if sent else "an API key is needed"
            raise ApiError(401, f"{problem}: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        return Caller(sent if is_owner else None, is_operator)

    def _require_this_machine(self, host: str) -> None:
        if self._settings.is_loopback and not is_loopback_name(_host_name(host)):
            raise ApiError(
                403,
                f"this server answers only to names of this machine, such as 127.0.0.1 and localhost, not to {host!r}: "
                "use one of them, or start the server with --api-key",
                code="wrong_host",
            )


def _is_open(path: str) -> bool:
    """Whether the path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _host_name(host: str) -> str:
    """A Host header without its port, and without the brackets of an IPv6 address."""
    if ":" in host.rpartition("]")[2]:
        host = host.rpartition(":")[0]
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _require_json(content_type: str) -> None:
    """Raise ApiError for a body of another media type.

    Any web page can make a browser send forms and plain text to any server, without asking that server first.
    """
    if not JSON_TYPE.fullmatch(content_type.partition(";")[0].strip()):
        given = f"is {content_type[:100]!r}" if content_type else "is missing"
        raise ApiError(
            415,
            f"the body's media type {given}: send JSON with `Content-Type: application/json`",
            code="unsupported_media_type",
        )


def _require_few_values(body: bytes, most: int) -> None:
    """Raise ApiError for a body that would take far more memory than its bytes once it is parsed."""
    if (found := num_values(body, most)) > most:
        raise ApiError(
            413,
            f"the request has at least {found} JSON names and values, and the limit is {most}: send fewer messages, or "
            "fewer fields in them",
            code="request_too_large",
        )


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request is larger than {max_bytes} bytes: send less", code="request_too_large")


async def _read(receive: Receive, max_bytes: int, take: Callable[[int], None]) -> bytes:
    body, has_more = bytearray(), True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        if len(body) + len(part) > max_bytes:
            raise _too_large(max_bytes)
        take(len(part))
        body += part
        has_more = message.get("more_body", False)
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that has been read already, then the rest."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


class PendingBytes:
    """Counts the bytes of all requests in progress, by owner.

    Args:
        max_bytes: for all owners together.
        max_owner_bytes: for one owner.
    """

    def __init__(self, max_bytes: int, max_owner_bytes: int) -> None:
        self._max_bytes, self._max_owner_bytes = max_bytes, max_owner_bytes
        self._held: Counter[str] = Counter()

    @contextmanager
    def of(self, owner: str) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes for an owner, until the end of the block.

        It raises ApiError: 429 if the owner has too many bytes, 503 if all owners together have.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self._held[owner] + count > self._max_owner_bytes:
                raise ApiError(
                    429,
                    f"the requests of this key in progress are larger than {self._max_owner_bytes} bytes: wait for "
                    "some of their answers, and try again",
                    type="rate_limit_error",
                    code="rate_limit_exceeded",
                )
            if self._held.total() + count > self._max_bytes:
                raise ApiError(503, "the server is full: try again in a moment", type="server_error", code="overloaded")
            self._held[owner] += count
            taken += count

        try:
            yield take
        finally:
            self._held[owner] -= taken
            if not self._held[owner]:
                del self._held[owner]


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
"""A dependency of each endpoint, for the OpenAPI description; the gate has checked the key before."""


async def owner_of(request: Request, _: Credentials) -> str:
    """The owner of a request.

    Raises:
        ApiError: the key is an operator's only.
    """
    caller: Caller = request.state.caller
    if caller.owner is None:
        raise ApiError(403, "an operator's key opens /metrics only: use an API key", code="operator_key")
    return caller.owner


async def require_operator(request: Request, _: Credentials) -> None:
    """Check that the sender may read the metrics of all owners.

    Raises:
        ApiError: the key is not an operator's.
    """
    caller: Caller = request.state.caller
    if not caller.is_operator:
        raise ApiError(
            403,
            "the metrics cover all keys, and are for the operator of the server: use a key that was given as "
            "--operator-key",
            code="operator_only",
        )


Owner = Annotated[str, Depends(owner_of)]
Operator = Annotated[None, Depends(require_operator)]
