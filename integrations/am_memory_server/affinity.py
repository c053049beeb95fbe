"""Session affinity: a key for each request, equal for all requests that should reach the same cache.

Reads the raw request. Knows no router, and checks no API key: the replica does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from pydantic import ValidationError

from am_memory_server.access import ANONYMOUS, owner_of_headers
from am_memory_server.errors import ApiError
from am_memory_server.request_schemas import ChatCompletionRequest, CompletionRequest
from am_memory_server.requests import conversation_of, thread_of
from am_memory_server.responses_request import ResponsesRequest

SESSIONS = "/v1/memory/sessions/"
ACTIONS = ("/compact", "/fork")
TEXT_CHARS, TEXT_IDS = 256, 64
"""Characters, or token ids, at the beginning of a plain prompt that identify it: it is longer at each call."""


def affinity(method: str, path: str, headers: Mapping[str, str], body: bytes, *, has_keys: bool) -> str | None:
    """The affinity key of a request; None if any replica will do.

    Args:
        headers: with lower-case names.
        has_keys: whether the server has API keys. Without any, all clients are one owner, whatever key they send.
    """
    owner = (owner_of_headers(headers) if has_keys else None) or ANONYMOUS
    try:
        match method, path:
            case "POST", "/v1/chat/completions":
                return thread_of((owner, conversation_of(ChatCompletionRequest.model_validate_json(body), headers)))
            case "POST", "/v1/responses":
                asked = ResponsesRequest.model_validate_json(body)
                name = asked.conversation_name or conversation_of(asked.as_chat(()), headers)
                return thread_of((owner, name))
            case "POST", "/v1/completions":
                return f"{owner} {_opening(CompletionRequest.model_validate_json(body))}"
    except (ApiError, ValidationError):  # every replica refuses it in the same way
        return None
    if path.startswith(SESSIONS):
        name = path.removeprefix(SESSIONS)
        for action in ACTIONS if method == "POST" else ():
            name = name.removesuffix(action)
        return thread_of((owner, name))
    return None


def _opening(request: CompletionRequest) -> str:
    first = request.prompts[0]
    opening = first[:TEXT_CHARS] if isinstance(first, str) else first[:TEXT_IDS]
    return sha256(repr(opening).encode("utf-8", "replace")).hexdigest()[:16]
