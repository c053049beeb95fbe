"""Which conversation a request is about, as far as it says so itself: for whoever chooses the replica that answers it.

Looks at the raw request. Knows no router, and lets nobody in: a key that is not right is refused where the answer is
made.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from pydantic import ValidationError

from am_memory_server.access import ANONYMOUS, owner_of_headers
from am_memory_server.chat_completions import conversation_of, thread_of
from am_memory_server.errors import ApiError
from am_memory_server.schemas import ChatCompletionRequest, CompletionRequest

SESSIONS = "/v1/memory/sessions/"
ACTIONS = ("/compact", "/fork")
TEXT_CHARS, TEXT_IDS = 256, 64
"""How much of a plain prompt's beginning tells it from others: it comes back longer each time."""


def affinity(method: str, path: str, headers: Mapping[str, str], body: bytes, *, has_keys: bool) -> str | None:
    """What is the same for all requests that should find the same memory; None where any replica will do.

    Args:
        headers: by their names in small letters.
        has_keys: the server asks for API keys; else everybody is the same owner, whatever key is sent.
    """
    owner = (owner_of_headers(headers) if has_keys else None) or ANONYMOUS
    try:
        match method, path:
            case "POST", "/v1/chat/completions":
                return thread_of((owner, conversation_of(ChatCompletionRequest.model_validate_json(body), headers)))
            case "POST", "/v1/completions":
                return f"{owner} {_opening(CompletionRequest.model_validate_json(body))}"
    except (ApiError, ValidationError):  # every replica refuses it with the same words
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
