"""What a server may be told: where it listens, who may use it, and how much of everything it takes."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from am_memory.errors import InvalidInput, problems

MIB = 2**20
Count = Annotated[int, Field(ge=1)]


class ServerSettings(BaseModel):
    """The settings of one server; frozen.

    Attributes:
        model_name: what clients call the model.
        host, port: where it listens.
        api_keys: any of them opens the server; none: everybody who reaches it may use it.
        cors_origins: web pages of other origins that may call it.
        max_tokens: of an answer, where a request says nothing.
        max_answer_tokens: that a request may ask for.
        max_body_bytes: of a request.
        max_active: answers that are written at the same time, token by token in turn.
        max_queued: requests of one key that wait for their turn.
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
    allow_anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    max_tokens: Count = 1024
    max_answer_tokens: Count = 16384
    max_body_bytes: Count = 16 * MIB
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

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"
