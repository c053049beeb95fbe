"""Session affinity: requests of one conversation get one key."""

from __future__ import annotations

import json
from typing import Any

import pytest
from am_memory_server.affinity import affinity

CHAT, TEXT, SESSIONS = "/v1/chat/completions", "/v1/completions", "/v1/memory/sessions"
HELLO = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hello yourself"}


def key(path: str, body: Any = None, *, method: str = "POST", has_keys: bool = True, **headers: str) -> str | None:
    named = {name.replace("_", "-"): value for name, value in {"authorization": "Bearer alice", **headers}.items()}
    return affinity(method, path, named, json.dumps(body).encode(), has_keys=has_keys)


def test_a_named_conversation_keeps_its_key_whatever_its_messages() -> None:
    named = [
        key(CHAT, {"messages": [HELLO], "metadata": {"conversation_id": "tea"}}),
        key(CHAT, {"messages": [ANSWER, HELLO], "user": "tea"}),
        key("/v1/responses", {"input": [ANSWER, HELLO], "conversation": "tea"}),
        key("/v1/responses", {"input": "hello", "metadata": {"conversation_id": "tea"}}),
        key(CHAT, {"messages": [HELLO]}, x_conversation_id="tea"),
        key(CHAT, {"messages": [HELLO]}, x_openwebui_chat_id="tea"),
        key(f"{SESSIONS}/tea", method="GET"),
        key(f"{SESSIONS}/tea", method="DELETE"),
        key(f"{SESSIONS}/tea/compact"),
        key(f"{SESSIONS}/tea/fork"),
    ]
    assert len({*named}) == 1
    assert named[0] is not None
    assert key(f"{SESSIONS}/tea/compact", method="GET") != named[0]  # a session may be called so


def test_without_a_name_the_first_messages_identify_a_conversation() -> None:
    first = key(CHAT, {"messages": [HELLO]})
    later = key(CHAT, {"messages": [HELLO, ANSWER, {"role": "user", "content": "and?"}], "stream": True})
    assert first == later != None  # noqa: E711
    assert key(CHAT, {"messages": [{"role": "system", "content": "be brief"}, HELLO]}) != first


def test_two_api_keys_never_share_a_conversation() -> None:
    asked = {"messages": [HELLO], "user": "tea"}
    assert key(CHAT, asked) != key(CHAT, asked, authorization="Bearer bob")


def test_without_api_keys_the_clients_key_does_not_matter() -> None:
    asked = {"messages": [HELLO], "user": "tea"}
    assert key(CHAT, asked, has_keys=False) == key(CHAT, asked, has_keys=False, authorization="")


def test_a_plain_prompt_that_grows_keeps_its_key() -> None:
    text = "once upon a time there was a lighthouse at the end of the world. " * 5
    assert key(TEXT, {"prompt": text}) == key(TEXT, {"prompt": f"{text}And then"})
    assert key(TEXT, {"prompt": text}) != key(TEXT, {"prompt": f"Another. {text}"})
    assert key(TEXT, {"prompt": [*range(100)]}) == key(TEXT, {"prompt": [*range(200)]})


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", CHAT, {"messages": []}),
        ("POST", CHAT, {"messages": [HELLO], "user": "\n"}),
        ("POST", TEXT, {"prompt": []}),
        ("GET", "/", None),
        ("GET", "/v1/models", None),
        ("GET", SESSIONS, None),
    ],
)
def test_a_request_without_a_conversation_can_go_to_any_replica(method: str, path: str, body: Any) -> None:
    assert key(path, body, method=method) is None


def test_a_body_that_is_not_json_can_go_to_any_replica() -> None:
    assert affinity("POST", CHAT, {}, b"\xff{", has_keys=False) is None
