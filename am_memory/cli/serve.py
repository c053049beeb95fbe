"""`am-memory serve`: the options of the web server, which is a package of its own."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from am_memory.cli.options import Loading, with_options
from am_memory.errors import InvalidInput
from am_memory.formatting import MEBIBYTE

if TYPE_CHECKING:
    from am_memory_server.settings import ServerSettings

KEYS_VARIABLE = "AM_MEMORY_API_KEYS"
OPERATOR_KEYS_VARIABLE = "AM_MEMORY_OPERATOR_KEYS"


class Reasoning(StrEnum):
    """What happens to the reasoning of an answer."""

    KEEP = "keep"
    DROP = "drop"


@dataclass(frozen=True)
class Serving:
    """Options of the server itself: its address, its keys and its limits."""

    model_name: Annotated[str | None, typer.Option(help="Name of the model for clients.", show_default="its own")] = (
        None
    )
    host: Annotated[str, typer.Option(help="Address to listen on. Any but a local one needs a key.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key that opens the server; may be repeated. Or set ${KEYS_VARIABLE}=ONE,TWO."),
    ] = None
    operator_key: Annotated[
        list[str] | None,
        typer.Option(help=f"A key that opens /metrics only; may be repeated. Or set ${OPERATOR_KEYS_VARIABLE}."),
    ] = None
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let everybody use a server that other machines can reach.")
    ] = False
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of a web page that may call the server; may be repeated.")
    ] = None
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse names in requests that the server does not know.")
    ] = False
    reasoning: Annotated[
        Reasoning, typer.Option(help="What the memory does with the <think> of an answer that is complete.")
    ] = Reasoning.KEEP
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens, if a request sets no limit.")] = 1024
    max_active: Annotated[int, typer.Option(help="Answers generated together; each key has a share.")] = 16
    max_answer_mib: Annotated[
        int | None, typer.Option(help="Size of their caches, in MiB; answers that do not fit wait. Default: no limit.")
    ] = None
    max_queued: Annotated[int, typer.Option(help="Waiting requests of one key.")] = 64
    max_sessions: Annotated[int, typer.Option(help="Conversations kept in memory.")] = 64
    max_session_mib: Annotated[int, typer.Option(help="Size of their caches, in MiB.")] = 4096
    max_body_mib: Annotated[int, typer.Option(help="Size of one request, in MiB.")] = 16
    max_body_values: Annotated[int, typer.Option(help="JSON names and values in one request.")] = 200_000
    max_pending_mib: Annotated[
        int, typer.Option(help="Size of all requests in progress, in MiB; each key has a share.")
    ] = 256
    max_connections: Annotated[int, typer.Option(help="Open connections.")] = 512
    body_seconds: Annotated[float, typer.Option(help="Time for the body of a request to arrive.")] = 60.0
    idle_seconds: Annotated[
        float, typer.Option(help="Time that a connection may stay open without a request, or without reading.")
    ] = 30.0
    shutdown_seconds: Annotated[float, typer.Option(help="Time for running answers to finish on shutdown.")] = 30.0

    def settings(self, model: str) -> ServerSettings:
        """The settings of the server.

        Raises:
            InvalidInput: an option is out of its range, or the server would be open to everybody by accident.
        """
        from am_memory_server.settings import ServerSettings

        return ServerSettings(
            model_name=self.model_name or name_of(model),
            host=self.host,
            port=self.port,
            api_keys=(*(self.api_key or ()), *keys_of_environment()),
            operator_keys=(*(self.operator_key or ()), *keys_of_environment(OPERATOR_KEYS_VARIABLE)),
            allow_anonymous=self.allow_anonymous,
            cors_origins=tuple(self.cors_origin or ()),
            strict=self.strict,
            reasoning=self.reasoning.value,
            max_tokens=self.max_tokens,
            max_active=self.max_active,
            max_answer_bytes=None if self.max_answer_mib is None else self.max_answer_mib * MEBIBYTE,
            max_queued=self.max_queued,
            max_sessions=self.max_sessions,
            max_session_bytes=self.max_session_mib * MEBIBYTE,
            max_body_bytes=self.max_body_mib * MEBIBYTE,
            max_body_values=self.max_body_values,
            max_pending_bytes=self.max_pending_mib * MEBIBYTE,
            max_connections=self.max_connections,
            body_seconds=self.body_seconds,
            idle_seconds=self.idle_seconds,
            shutdown_seconds=self.shutdown_seconds,
        )


@with_options(Loading(), Serving())
def serve(
    loading: Loading,
    serving: Serving,
    store: Annotated[
        str | None,
        typer.Option(help="Where conversations are saved: a folder or any fsspec URL.", show_default="nowhere"),
    ] = None,
) -> None:
    """Serve OpenAI's API, and a chat page at /, for conversations without an end."""
    try:
        from am_memory_server.serve import serve as run
    except ModuleNotFoundError as error:  # it says what to install
        raise InvalidInput(str(error)) from error
    settings = serving.settings(loading.model)
    run(loading.load(store=store), settings)


def keys_of_environment(variable: str = KEYS_VARIABLE) -> tuple[str, ...]:
    """The keys in an environment variable, separated by commas or spaces."""
    return tuple(filter(None, re.split(r"[,\s]+", os.environ.get(variable, ""))))


def name_of(model: str) -> str:
    """The name of a model for clients: a hub id as it is, the last part of a path."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model
