"""Who may call, and with how much: API keys, the machine that is asked for, the bytes of requests and their time.

All of it is settled by a request's head before its body is read. An owner stands for an API key: a digest of it, which
names all that belongs to its conversations.
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
"""Beside these, everything takes a key where there are any: a path that is forgotten here is closed."""
JSON_TYPE = re.compile(r"application/([^/;\s]+\+)?json", re.IGNORECASE)

bearer = HTTPBearer(auto_error=False, description="An API key of the server, where it has any.")


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        owner: whose conversations are meant; None for a key that opens the server's figures alone.
        is_operator: may see what all owners do together.
    """

    owner: str | None
    is_operator: bool


def owner_of_key(key: str) -> str:
    """The digest that stands for a key."""
    return sha256(f"am_memory.server {key}".encode("utf-8", "replace")).hexdigest()[:16]


def owner_of_headers(headers: Mapping[str, str]) -> str | None:
    """The digest of the key that a request brings, right or wrong; None where it brings none."""
    scheme, key = get_authorization_scheme_param(headers.get("authorization"))
    return owner_of_key(key) if scheme.lower() == "bearer" and key else None


class Gate:
    """Lets a request in by what its head says; only then is its body read, within bounds of bytes and of time."""

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
        except ApiError as error:  # of the gate: those of the application are answered within it
            await error.response()(scope, receive, send)


class Admission:
    """Who is let in, and what they may send. Sends nothing itself."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._owners = [owner_of_key(key) for key in settings.api_keys]
        self._operators = [owner_of_key(key) for key in settings.operator_keys]
        self._pending = PendingBytes(settings.max_pending_bytes, settings.max_key_pending_bytes)

    @asynccontextmanager
    async def body_of(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """The body of a request that is let in, counted as the caller's until the end of the block.

        Of other methods than POST none is read. The caller is written into the scope's state.

        Raises:
            ApiError: by its head it is not let in; or the body is no JSON, too large, too slow, more than may wait, or
                would become too much.
            ClientDisconnect: the client went away before its end.
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
                    f"the request's body did not arrive within {settings.body_seconds:g} s: send it faster, or less",
                    code="request_timeout",
                ) from None
            _require_few_values(body, settings.max_body_values)
            yield body

    def caller_of(self, headers: Mapping[str, str]) -> Caller:
        """Whose request it is.

        Raises:
            ApiError: 401 without a right key; 403 for a page that had a browser call this machine under another name.
        """
        sent = owner_of_headers(headers)
        # Digests are compared, so that the time which this takes says nothing of a key.
        is_operator = any(hmac.compare_digest(sent or "", known) for known in self._operators)
        if not self._owners:
            self._require_this_machine(headers.get("host", ""))
            return Caller(ANONYMOUS, is_operator or not self._operators)
        is_owner = any(hmac.compare_digest(sent or "", known) for known in self._owners)
        if not is_owner and not is_operator:
            problem = "this is none of the server's API keys" if sent else "an API key is needed"
            raise ApiError(401, f"{problem}: send it as `Authorization: Bearer KEY`", code="invalid_api_key")
        return Caller(sent if is_owner else None, is_operator)

    def _require_this_machine(self, host: str) -> None:
        if self._settings.is_loopback and not is_loopback_name(_host_name(host)):
            raise ApiError(
                403,
                f"this server answers to this machine's own names alone, such as 127.0.0.1 and localhost, not to "
                f"{host!r}: ask for one of those, or start it with --api-key",
                code="wrong_host",
            )


def _is_open(path: str) -> bool:
    """Whether everybody may ask for it."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _host_name(host: str) -> str:
    """Without a port, and without the brackets of an IPv6 address."""
    if ":" in host.rpartition("]")[2]:
        host = host.rpartition(":")[0]
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _require_json(content_type: str) -> None:
    """Raise ApiError for a body under another media type.

    Those of forms and of plain text are what a browser sends for any page to any server without asking that server.
    """
    if not JSON_TYPE.fullmatch(content_type.partition(";")[0].strip()):
        told = f"is {content_type[:100]!r}" if content_type else "is not said"
        raise ApiError(
            415,
            f"the body's media type {told}: send JSON, and say so with `Content-Type: application/json`",
            code="unsupported_media_type",
        )


def _require_few_values(body: bytes, most: int) -> None:
    """Raise ApiError for a body that would take far more memory than its bytes, once it is read as JSON."""
    if (found := num_values(body, most)) > most:
        raise ApiError(
            413,
            f"the request has {found} JSON names and values or more, and {most} at most are read: send fewer messages, "
            "or fewer fields in them",
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
    """What gives a body that was read already, and then whatever else comes."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


class PendingBytes:
    """How many bytes of requests are held, and for whom.

    Args:
        most: for all together.
        most_of_one: for one owner.
    """

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._held: Counter[str] = Counter()

    @contextmanager
    def of(self, owner: str) -> Iterator[Callable[[int], None]]:
        """What takes bytes for an owner, which are given back at the end of the block.

        It raises ApiError where there are too many of them: 429 for what this owner holds, 503 for what all do.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            if self._held[owner] + count > self._most_of_one:
                raise ApiError(
                    429,
                    f"the requests of this key that are under way are larger than {self._most_of_one} bytes: "
                    "wait for some of their answers, and try again",
                    type="rate_limit_error",
                    code="rate_limit_exceeded",
                )
            if self._held.total() + count > self._most:
                raise ApiError(
                    503, "the server holds as much as it can: try again", type="server_error", code="overloaded"
                )
            self._held[owner] += count
            taken += count

        try:
            yield take
        finally:
            self._held[owner] -= taken
            if not self._held[owner]:
                del self._held[owner]


Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
"""Asked for by each endpoint so that the description says so; the gate has looked at them before."""


async def owner_of(request: Request, _: Credentials) -> str:
    """Whose request it is.

    Raises:
        ApiError: the key is not for conversations.
    """
    caller: Caller = request.state.caller
    if caller.owner is None:
        raise ApiError(403, "an operator's key opens /metrics alone: take an API key", code="operator_key")
    return caller.owner


async def require_operator(request: Request, _: Credentials) -> None:
    """Let only those in who may see what all owners do together.

    Raises:
        ApiError: who asks is not one of them.
    """
    caller: Caller = request.state.caller
    if not caller.is_operator:
        raise ApiError(
            403,
            "these figures are of all keys together, and for whoever runs the server: ask with a key that it was given "
            "as --operator-key",
            code="operator_only",
        )


Owner = Annotated[str, Depends(owner_of)]
Operator = Annotated[None, Depends(require_operator)]
