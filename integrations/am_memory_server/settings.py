"""Settings of a server: its address, its keys and its limits."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from am_memory.errors import InvalidInput, problems
from am_memory.formatting import MEBIBYTE

MAX_SHARES = 4
"""With more keys than this, a key may still have a quarter of `max_pending_bytes`."""
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Frozen settings whose errors are `InvalidInput`, and never show a value: it may be a key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = problems(error.errors(), type(self).model_fields, shows_values=False)
            raise InvalidInput(found) from error
        self._check()

    def _check(self) -> None:
        """Raise InvalidInput for values that cannot go together."""


class ServerSettings(Settings):
    """The settings of one server.

    Attributes:
        model_name: name of the model for clients.
        host, port: the address to listen on.
        api_keys: each opens the server. Without any, everybody who reaches the server may use it.
        operator_keys: each opens the metrics of the whole server, and nothing else. A key may be in both.
        allow_anonymous: allow a server without API keys that other machines can reach.
        cors_origins: origins of web pages that may call the server.
        strict: refuse unknown names in requests of OpenAI's API. Otherwise a header of the answer names them.
        reasoning: "keep" the `<think>` of an answer in the memory, or "drop" it once the answer is complete.
        max_tokens: longest answer, if a request sets no limit.
        max_answer_tokens: longest answer that a request may ask for.
        max_body_bytes: size of one request.
        max_body_values: JSON names and values in one request: they take far more memory than their bytes.
        max_pending_bytes: size of all requests in progress; with several API keys, one key has a share.
        max_connections: open connections; a new one closes the oldest one without a request.
        body_seconds: time for the body of a request to arrive.
        idle_seconds: time that a connection may stay open without a request, or without reading what it was sent.
        max_active: answers that are generated together, a token of each in one pass. Each key has a share of them, at
            least one.
        max_answer_bytes: size of the caches of answers that are generated together; further ones wait. A cache counts
            with the bytes that it reaches before it is compacted, or before its answer ends. None: no limit.
        max_queued: waiting requests of one key, of any kind.
        max_sessions: conversations kept in memory; each branch counts.
        max_session_bytes: size of their caches.
        max_texts: compact texts of one key.
        max_responses: responses of one key that `previous_response_id` may name; the oldest are forgotten.
        shutdown_seconds: time for running answers to finish when the server stops.

    Raises:
        InvalidInput: a value is out of its range, or the server would be open to everybody by accident.
    """

    model_name: Annotated[str, Field(min_length=1)] = "demo"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[Annotated[str, Field(min_length=8)], ...] = ()
    operator_keys: tuple[Annotated[str, Field(min_length=8)], ...] = ()
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    strict: bool = False
    reasoning: Literal["keep", "drop"] = "keep"
    max_tokens: PositiveInt = 1024
    max_answer_tokens: PositiveInt = 16384
    max_body_bytes: PositiveInt = 16 * MEBIBYTE
    max_body_values: PositiveInt = 200_000
    max_pending_bytes: PositiveInt = 256 * MEBIBYTE
    max_connections: PositiveInt = 512
    body_seconds: Seconds = 60.0
    idle_seconds: Seconds = 30.0
    max_active: PositiveInt = 16
    max_answer_bytes: PositiveInt | None = None
    max_queued: PositiveInt = 64
    max_sessions: Annotated[int, Field(ge=2)] = 64
    max_session_bytes: Annotated[int, Field(ge=2)] = 4096 * MEBIBYTE
    max_texts: PositiveInt = 100
    max_responses: PositiveInt = 1000
    shutdown_seconds: Annotated[float, Field(ge=0)] = 30.0

    def _check(self) -> None:
        if not self.is_loopback and not self.api_keys and not self.allow_anonymous:
            raise InvalidInput(
                f"host {self.host} can be reached from other machines, and there is no API key: give --api-key, or "
                "--allow-anonymous if everybody may use this server"
            )
        if self.max_tokens > self.max_answer_tokens:
            raise InvalidInput(
                f"max_tokens {self.max_tokens} is above max_answer_tokens {self.max_answer_tokens}: lower the one, or "
                "raise the other"
            )
        if self.max_body_bytes > self.max_key_pending_bytes:
            raise InvalidInput(
                f"max_body_bytes {self.max_body_bytes} is above {self.max_key_pending_bytes}, one key's share of "
                f"max_pending_bytes {self.max_pending_bytes}: lower the one, or raise the other"
            )

    @property
    def max_key_pending_bytes(self) -> int:
        """One key's share of `max_pending_bytes`: all of it, if there is no other key."""
        return self.max_pending_bytes // max(1, min(len(self.api_keys), MAX_SHARES))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback_name(self.host.strip("[]"))


def is_loopback_name(name: str) -> bool:
    """Whether a host name, or an IP address without brackets, always means this machine (RFC 6761, section 6.3).

    No name server can make it point anywhere else.
    """
    name = name.lower().removesuffix(".")
    try:
        address = ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
