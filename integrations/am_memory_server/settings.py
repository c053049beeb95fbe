"""What a server may be told: where it listens, who may use it, and how much of everything it takes."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from am_memory.errors import InvalidInput, problems

MIB = 2**20
MOST_SHARES = 4
"""However many keys there are, one may have a quarter of what is for all of them."""
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServerSettings(BaseModel):
    """The settings of one server; frozen.

    Attributes:
        model_name: what clients call the model.
        host, port: where it listens.
        api_keys: any of them opens the server; none: everybody who reaches it may use it.
        operator_keys: any of them opens the figures of the whole server, and nothing else; one may be an API key too.
        cors_origins: web pages of other origins that may call it.
        max_tokens: of an answer, where a request says nothing.
        max_answer_tokens: that a request may ask for.
        max_body_bytes: of a request.
        max_body_values: JSON names and values in it, wherever: they take more than their bytes.
        max_pending_bytes: of the bodies of all requests that are read, wait or are answered; where there are several
            API keys, one of them gets a share.
        max_connections: open at once; the oldest one that asks for nothing makes room for a new one.
        body_seconds: that the body of a request may take to arrive.
        idle_seconds: that a connection may go without asking for anything, or without taking what it was sent.
        max_active: answers that are written at the same time, token by token in turn. Each key has a share of these
            places, one at least, whoever else holds how many.
        max_queued: requests of one key that wait for their turn, whatever they ask for.
        max_sessions: conversations kept in memory, each of their branches counted.
        max_session_bytes: what their caches may take.
        shutdown_seconds: that answers get to come to their end when the server stops.

    Raises:
        InvalidInput: a value out of its range, or a server that is open to everybody by accident.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: Annotated[str, Field(min_length=1)] = "demo"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys: tuple[Annotated[str, Field(min_length=8)], ...] = ()
    operator_keys: tuple[Annotated[str, Field(min_length=8)], ...] = ()
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    max_tokens: Count = 1024
    max_answer_tokens: Count = 16384
    max_body_bytes: Count = 16 * MIB
    max_body_values: Count = 200_000
    max_pending_bytes: Count = 256 * MIB
    max_connections: Count = 512
    body_seconds: Seconds = 60.0
    idle_seconds: Seconds = 30.0
    max_active: Count = 4
    max_queued: Count = 64
    max_sessions: Annotated[int, Field(ge=2)] = 64
    max_session_bytes: Annotated[int, Field(ge=2)] = 4096 * MIB
    shutdown_seconds: Annotated[float, Field(ge=0)] = 30.0

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found = problems(error.errors(), type(self).model_fields, shows_values=False)  # one may be a key
            raise InvalidInput(found) from error
        if not self.is_loopback and not self.api_keys and not self.allow_anonymous:
            raise InvalidInput(
                f"host {self.host} is open to other machines, and there is no API key: give --api-key, or say "
                "--allow-anonymous if everybody may use this server"
            )
        if self.max_tokens > self.max_answer_tokens:
            raise InvalidInput(f"max_tokens {self.max_tokens} is above max_answer_tokens {self.max_answer_tokens}")
        if self.max_body_bytes > self.max_key_pending_bytes:
            raise InvalidInput(
                f"max_body_bytes {self.max_body_bytes} is more than the {self.max_key_pending_bytes} bytes that one "
                f"key may have of max_pending_bytes {self.max_pending_bytes}: lower the one, or raise the other"
            )

    @property
    def max_key_pending_bytes(self) -> int:
        """What one key may have of `max_pending_bytes`: all of it, where there is no other."""
        return self.max_pending_bytes // max(1, min(len(self.api_keys), MOST_SHARES))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback_name(self.host.strip("[]"))


def is_loopback_name(name: str) -> bool:
    """Whether a name, or an IP address without brackets, is one that a machine calls itself by: RFC 6761, section 6.3.

    Nobody can have such a name point anywhere else.
    """
    name = name.lower().removesuffix(".")
    try:
        address = ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback
