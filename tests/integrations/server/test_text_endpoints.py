"""Compact texts over HTTP: made, listed, mounted and deleted, each by its own key."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from am_memory_server.access import ANONYMOUS
from serving import NewServer, say

TEXTS = "/v1/memory/texts"
ALICE, BOB = "key-of-alice", "key-of-bob"
HANDBOOK = "The ferry leaves at noon, and the key is under the third stone from the left. " * 2


def test_a_text_is_made_listed_inspected_and_deleted(http: httpx.Client) -> None:
    made = http.post(TEXTS, json={"id": "hand/book", "text": HANDBOOK})
    assert made.status_code == 201
    entry = made.json()
    assert (entry["id"], entry["object"]) == ("hand/book", "memory.text")
    assert entry["num_tokens"] > len(HANDBOOK) > 3 * entry["num_slots"]
    assert entry["preview"].startswith("The ferry leaves at noon")
    assert http.get(TEXTS).json() == {"object": "list", "data": [entry]}
    assert http.get(f"{TEXTS}/hand/book").json() == entry
    assert http.delete(f"{TEXTS}/hand/book").json()["deleted"] is True
    for response in (http.get(f"{TEXTS}/hand/book"), http.delete(f"{TEXTS}/hand/book")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "text_not_found"


def test_a_conversation_begins_with_its_mounts(http: httpx.Client) -> None:
    http.post(TEXTS, json={"id": "handbook", "text": HANDBOOK})
    plain = say(http, "hello there").json()
    mounted = say(http, "hello there", mounts=["handbook"]).json()
    again = say(http, "hello there", mounts=["handbook", "handbook"]).json()
    assert mounted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # it is another conversation
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert mounted["am_memory"]["stats"]["logical_tokens"] == plain["am_memory"]["stats"]["logical_tokens"]
    (mount,) = http.get("/v1/memory/sessions/tea").json()["mounts"]
    assert (mount["id"], mount["at_tokens"]) == ("handbook", 0)
    more = mounted["am_memory"]["stats"]["kv_tokens"] - plain["am_memory"]["stats"]["kv_tokens"]
    assert more == pytest.approx(mount["num_slots"], abs=0.01)


def test_a_new_text_of_the_same_name_is_another_conversation(http: httpx.Client) -> None:
    http.post(TEXTS, json={"id": "handbook", "text": HANDBOOK})
    say(http, "hello there", mounts=["handbook"])
    http.post(TEXTS, json={"id": "handbook", "text": "The ferry never leaves, and nobody knows about the key. " * 2})
    answer = say(http, "hello there", mounts=["handbook"]).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_messages_with_tools_and_conversations_become_texts(http: httpx.Client) -> None:
    told = [{"role": "user", "content": HANDBOOK}, {"role": "assistant", "content": "I shall remember."}]
    tool = {"type": "function", "function": {"name": "tides", "description": "The tides of a day."}}
    plain = http.post(TEXTS, json={"id": "told", "messages": told}).json()
    tools = http.post(TEXTS, json={"id": "tools", "messages": told, "tools": [tool]}).json()
    assert tools["num_tokens"] > plain["num_tokens"]
    say(http, HANDBOOK)
    text = http.post(TEXTS, json={"id": "heard", "session": "tea", "keep_ratio": 0.5}).json()
    assert text["num_tokens"] > len(HANDBOOK)
    answer = say(http, "hello", mounts=["heard", "told"], conversation="other")
    assert answer.status_code == 200


def test_unknown_texts_and_wrong_bodies_are_refused(http: httpx.Client) -> None:
    answer = say(http, "hello", mounts=["manual"])
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "there is no compact text 'manual': GET /v1/memory/texts lists them",
        "type": "invalid_request_error",
        "param": None,
        "code": "text_not_found",
    }
    for body in ({"id": "x"}, {"id": "x", "text": "a", "session": "b"}, {"id": "", "text": "a"}, {"text": "a"}):
        assert http.post(TEXTS, json=body).status_code == 400
    assert http.post(TEXTS, json={"id": "x", "session": "nobody"}).status_code == 404


def test_names_are_shown_without_the_key_they_belong_to(http: httpx.Client) -> None:
    """An error named the digest of the key, which an application passes on to whoever chats with it."""
    for id in ("one", "two", "three", "four"):
        http.post(TEXTS, json={"id": id, "text": HANDBOOK * 4, "keep_ratio": 1})
    answer = say(http, "hello", mounts=["one", "two", "three", "four"])
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert re.search(r"'(one|two|three|four)' takes \d+ slots, and does not fit", message)
    assert ANONYMOUS not in message


def test_a_name_too_long_for_a_file_is_no_text(http: httpx.Client) -> None:
    """It was a failure of the store, which the log told with the whole name."""
    long = "x" * 5000
    assert http.get(f"{TEXTS}/{long}").json()["error"]["code"] == "text_not_found"
    assert say(http, "hello", mounts=[long]).json()["error"]["code"] == "text_not_found"


def test_a_key_has_no_more_texts_than_allowed(new_server: NewServer) -> None:
    with new_server(max_texts=1) as server, server.http() as http:
        for expected, id in ((201, "one"), (201, "one"), (409, "two")):
            assert http.post(TEXTS, json={"id": id, "text": HANDBOOK}).status_code == expected


def test_a_stranger_can_neither_see_nor_mount_a_text(new_server: NewServer, tmp_path: Path) -> None:
    keys = {"api_keys": [ALICE, BOB], "store": tmp_path}
    with new_server(**keys) as server, server.http(ALICE) as alice, server.http(BOB) as bob:
        alice.post(TEXTS, json={"id": "secret", "text": HANDBOOK})
        (name,) = [text.name for text in server.service.memory.compact_texts()]
        assert bob.get(TEXTS).json()["data"] == []
        for id in ("secret", name, f"../{name}"):
            assert bob.get(f"{TEXTS}/{id}").status_code == 404
            assert bob.delete(f"{TEXTS}/{id}").status_code == 404
            answer = say(bob, "hello", mounts=[id])
            assert answer.status_code == 404
            assert name.partition("/")[0] not in answer.json()["error"]["message"].replace(id, "")
        assert say(alice, "hello", mounts=["secret"]).status_code == 200
