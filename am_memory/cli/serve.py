"""`am-memory serve`: the options of the web server, which is a package of its own."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from am_memory.cli.options import (
    Compile,
    Device,
    Dtype,
    KeepRatio,
    Model,
    Pinned,
    RunBy,
    TriggerTokens,
    TrustMessages,
    TrustRemoteCode,
    WindowTokens,
    policy_of,
)
from am_memory.errors import InvalidInput
from am_memory.memory import Memory

KEYS_VARIABLE = "AM_MEMORY_API_KEYS"
OPERATOR_KEYS_VARIABLE = "AM_MEMORY_OPERATOR_KEYS"
MIB = 2**20


def serve(  # noqa: PLR0913, PLR0917  # each is an option of the command
    model: Model = "demo",
    engine: RunBy = "transformers",
    model_name: Annotated[str | None, typer.Option(help="What clients call it [default: by the model]")] = None,
    trigger_tokens: TriggerTokens = 2048,
    keep_ratio: KeepRatio = 0.1,
    pinned: Pinned = "system",
    store: Annotated[
        str | None, typer.Option(help="Where conversations are kept: a folder or any fsspec URL [default: nowhere]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine it takes a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Opens the server; several may be given. Better in ${KEYS_VARIABLE}, with commas between."),
    ] = None,
    operator_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Opens /metrics alone; several may be given. Better in ${OPERATOR_KEYS_VARIABLE}."),
    ] = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Let everybody in who reaches the server.")
    ] = False,
    cors_origin: Annotated[list[str] | None, typer.Option(help="A web page's origin that may call the server.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, where a request says nothing.")] = 1024,
    max_active: Annotated[int, typer.Option(help="Answers written at once, in turn; each key has a share.")] = 4,
    max_queued: Annotated[int, typer.Option(help="Requests of one key that may wait.")] = 64,
    max_sessions: Annotated[int, typer.Option(help="Conversations kept in memory.")] = 64,
    max_session_mib: Annotated[int, typer.Option(help="What their caches may take, in MiB.")] = 4096,
    max_body_mib: Annotated[int, typer.Option(help="Size of a request, in MiB.")] = 16,
    max_body_values: Annotated[int, typer.Option(help="JSON names and values in a request.")] = 200_000,
    max_pending_mib: Annotated[int, typer.Option(help="Requests under way, in MiB; one key has a share.")] = 256,
    max_connections: Annotated[int, typer.Option(help="Connections open at once.")] = 512,
    body_seconds: Annotated[float, typer.Option(help="For the body of a request to arrive.")] = 60.0,
    idle_seconds: Annotated[float, typer.Option(help="That a connection may ask for nothing, or read nothing.")] = 30.0,
    shutdown_seconds: Annotated[float, typer.Option(help="For running answers to come to their end.")] = 30.0,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    trust_messages: TrustMessages = False,
    window_tokens: WindowTokens = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve OpenAI's API, and a chat page at /, with history without an end."""
    try:
        from am_memory_server.serve import serve as run
        from am_memory_server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise InvalidInput(f"the server needs {error.name}: pip install 'attention-matching-memory[server]'") from error
    settings = ServerSettings(
        model_name=model_name or name_of(model),
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *keys_of_environment()),
        operator_keys=(*(operator_key or ()), *keys_of_environment(OPERATOR_KEYS_VARIABLE)),
        allow_anonymous=allow_anonymous,
        cors_origins=tuple(cors_origin or ()),
        max_tokens=max_tokens,
        max_active=max_active,
        max_queued=max_queued,
        max_sessions=max_sessions,
        max_session_bytes=max_session_mib * MIB,
        max_body_bytes=max_body_mib * MIB,
        max_body_values=max_body_values,
        max_pending_bytes=max_pending_mib * MIB,
        max_connections=max_connections,
        body_seconds=body_seconds,
        idle_seconds=idle_seconds,
        shutdown_seconds=shutdown_seconds,
    )
    policy = policy_of(trigger_tokens, keep_ratio, pinned)
    memory = Memory.from_pretrained(
        model,
        engine=engine,
        policy=policy,
        device=device,
        dtype=dtype,
        compile=compile,
        store=store,
        trust_messages=trust_messages,
        window_tokens=window_tokens,
        trust_remote_code=trust_remote_code,
    )
    run(memory, settings)


def keys_of_environment(variable: str = KEYS_VARIABLE) -> tuple[str, ...]:
    """The keys that the environment names."""
    return tuple(filter(None, re.split(r"[,\s]+", os.environ.get(variable, ""))))


def name_of(model: str) -> str:
    """What clients call a model: a hub id as it is, the last part of a path."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model
