"""Checks that several endpoints make of a request: its model, its conversation, its limits."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from am_memory.memory import Memory
from am_memory.text.sampling import Sampling
from am_memory_server.errors import ApiError
from am_memory_server.jobs import TurnKey
from am_memory_server.request_schemas import CONVERSATION_KEYS, ChatCompletionRequest, Sampled
from am_memory_server.settings import ServerSettings

CONVERSATION_HEADERS = ("x-conversation-id", "x-openwebui-chat-id")
MAX_CONVERSATION_CHARS = 200


def require_model(settings: ServerSettings, model: str | None) -> None:
    """Raise ApiError if a request names another model than the served one."""
    name = settings.model_name
    if model is not None and model != name:
        raise ApiError(
            404, f"there is no model {model!r} here: ask for {name!r}", code="model_not_found", param="model"
        )


def conversation_of(body: ChatCompletionRequest, headers: Mapping[str, str]) -> str:
    """The name of the conversation: the client's, else a digest of its first messages.

    Raises:
        ApiError: the client's name is not allowed.
    """
    in_headers = (headers.get(name) for name in CONVERSATION_HEADERS)
    in_metadata = (body.metadata or {}).get(CONVERSATION_KEYS[0])
    name = in_metadata or next(filter(None, in_headers), body.conversation_hint)
    if name is not None:
        return checked_name(name)
    opening = []
    for message in body.messages:
        opening.append(message.model_dump_json())
        if message.role == "user":
            break
    return f"auto-{sha256(''.join(opening).encode()).hexdigest()[:16]}"


def checked_name(name: str, param: str = "metadata") -> str:
    """The name of a conversation, as it is.

    Args:
        param: where the request has it, for the error.

    Raises:
        ApiError: the name is not allowed.
    """
    limit = MAX_CONVERSATION_CHARS
    if not 0 < len(name) <= limit or not name.isprintable():
        raise ApiError(
            400, f"{name[:50]!r} cannot name a conversation: give 1 to {limit} printable characters", param=param
        )
    return name


def thread_of(key: TurnKey) -> str:
    """The thread that holds an owner's conversation."""
    return "/".join(key)


def text_of(owner: str, id: str) -> str:
    """The name of an owner's compact text in the memory."""
    return f"{owner}/{id}"


def max_tokens_of(settings: ServerSettings, *limits: int | None) -> int:
    """The longest answer, in tokens: the first limit that a request sets, else the server's default.

    Raises:
        ApiError: it is longer than the server allows.
    """
    max_tokens = next(filter(None, limits), settings.max_tokens)
    if max_tokens > (most := settings.max_answer_tokens):
        raise ApiError(400, f"max_tokens {max_tokens} is above this server's limit of {most}: ask for fewer tokens")
    return max_tokens


def sampling_of(memory: Memory, body: Sampled) -> Sampling:
    """The sampling of a request; what it does not set is the model's default.

    Raises:
        ApiError: `logit_bias` names a token that the model does not have.
    """
    vocab_size = memory.engine.info.vocab_size
    if (last := max(body.logit_bias, default=0)) >= vocab_size:
        raise ApiError(
            400, f"logit_bias names token {last}: this model has tokens 0 to {vocab_size - 1}", param="logit_bias"
        )
    return Sampling(**{**memory.sampling.model_dump(), **body.sampling()})
