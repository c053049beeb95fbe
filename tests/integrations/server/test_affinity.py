"""Which requests are about the same conversation, as a router sees them."""

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


def test_a_conversation_is_its_name_however_it_is_given_and_whatever_it_says() -> None:
    named = [
        key(CHAT, {"messages": [HELLO], "metadata": {"conversation_id": "tea"}}),
        key(CHAT, {"messages": [ANSWER, HELLO], "user": "tea"}),
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


def test_without_a_name_the_opening_messages_tell_it() -> None:
    first = key(CHAT, {"messages": [HELLO]})
    later = key(CHAT, {"messages": [HELLO, ANSWER, {"role": "user", "content": "and?"}], "stream": True})
    assert first == later != None  # noqa: E711
    assert key(CHAT, {"messages": [{"role": "system", "content": "be brief"}, HELLO]}) != first


def test_conversations_of_two_keys_are_two() -> None:
    asked = {"messages": [HELLO], "user": "tea"}
    assert key(CHAT, asked) != key(CHAT, asked, authorization="Bearer bob")


def test_where_the_server_has_no_keys_it_does_not_matter_which_one_is_sent() -> None:
    asked = {"messages": [HELLO], "user": "tea"}
    assert key(CHAT, asked, has_keys=False) == key(CHAT, asked, has_keys=False, authorization="")


def test_a_plain_text_that_grows_is_the_same_one() -> None:
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
def test_any_replica_will_do_for_what_is_about_no_conversation(method: str, path: str, body: Any) -> None:
    assert key(path, body, method=method) is None


def test_a_body_that_is_no_json_is_about_no_conversation() -> None:
    assert affinity("POST", CHAT, {}, b"\xff{", has_keys=False) is None
