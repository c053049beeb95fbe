"""The memory endpoints: views match the cache, and compact, fork and delete take effect."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from am_memory_server.access import ANONYMOUS
from inside import shared_of
from serving import POLICY, NewServer, say, until

from am_memory.events import CompactionFinished, CompactionReport, CompactionStarted, Event
from am_memory.session import idle

SESSIONS = "/v1/memory/sessions"
LONG = "a prompt longer than the cache, which is compacted as it is read. " * 12


def test_a_view_accounts_for_every_token_slot_and_byte(http: httpx.Client) -> None:
    say(http, LONG)
    view = http.get(f"{SESSIONS}/tea").json()
    stats, segments, layers = view["stats"], view["segments"], view["layers"]
    assert stats["num_compactions"] == len(view["compactions"]) > 1
    assert segments[0]["start"] == 0
    assert [part["end"] for part in segments[:-1]] == [part["start"] for part in segments[1:]]
    assert segments[-1]["end"] == stats["logical_tokens"] - 1  # the last token is read with what follows it
    assert sum(part["slots"] for part in segments) == pytest.approx(stats["kv_tokens"], abs=0.1)
    assert sum(sum(layer["bytes"]) for layer in layers) == stats["kv_bytes"]
    num_heads = sum(len(layer["slots"]) for layer in layers)
    compact = sum(part["slots"] for part in segments if part["kind"] == "compacted")
    assert sum(sum(layer["slots"]) for layer in layers) / num_heads == pytest.approx(compact, abs=0.1)


def test_a_view_counts_how_often_a_segment_was_shrunk(http: httpx.Client) -> None:
    say(http, LONG)
    cuts = [part["num_cuts"] for part in http.get(f"{SESSIONS}/tea").json()["segments"] if part["kind"] == "compacted"]
    assert cuts[-1] == 0
    assert cuts == sorted(cuts, reverse=True)
    assert cuts[0] > 0


def test_an_idle_server_refines_the_segments_of_its_conversations(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next turn goes on from the refined ones."""
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.05)
    policy = POLICY.with_changes(refine="idle", self_study_tokens=4)
    with new_server(policy=policy) as server, server.http() as http:
        asked: list[dict[str, Any]] = [{"role": "user", "content": LONG}]
        spoken = {"metadata": {"conversation_id": "tea"}, "temperature": 0}
        answer = http.post("/v1/chat/completions", json={"messages": asked, **spoken}).json()

        def refined() -> list[bool]:
            view = http.get(f"{SESSIONS}/tea").json()
            return [part["is_refined"] for part in view["segments"] if part["kind"] == "compacted"]

        until(lambda: all(refined()))
        asked += [answer["choices"][0]["message"], {"role": "user", "content": "And?"}]
        http.post("/v1/chat/completions", json={"messages": asked, **spoken, "max_tokens": 1})
        assert any(refined())
        shared_of(server.service.memory).idle_worker.close()


def test_a_stream_shows_no_other_conversations_events(new_server: NewServer) -> None:
    """The idle worker compacts and refines other conversations meanwhile: their reports went to whoever was answered."""
    other = CompactionReport("anonymous/coffee", 987654, 987659, *[0.0] * 10)

    def on_event(event: Event) -> None:
        if isinstance(event, CompactionStarted) and event.session == "anonymous/tea":
            for foreign in (CompactionFinished(other.session, other), CompactionStarted(other.session, 987654, 9, 9.0)):
                shared_of(server.service.memory).notify(foreign)

    with new_server() as server, server.http() as http:
        server.service.memory.on_event = on_event
        shown = say(http, LONG, stream=True, stream_options={"include_memory": True}).text
        view = http.get(f"{SESSIONS}/tea").json()
    assert shown.count('"event":"compacted"') == view["stats"]["num_compactions"] == len(view["compactions"]) > 1
    assert "987654" not in shown
    assert "987654" not in str(view)


def test_compacting_now_makes_the_cache_smaller(http: httpx.Client) -> None:
    say(http, "short enough to be exact, long enough to be compacted. " * 3)
    before = http.get(f"{SESSIONS}/tea").json()
    report = http.post(f"{SESSIONS}/tea/compact", json={"fraction": 0.8}).json()
    after = http.get(f"{SESSIONS}/tea").json()
    assert before["stats"]["num_compactions"] == 0
    assert report["kv_tokens_after"] == pytest.approx(after["stats"]["kv_tokens"])
    assert after["stats"]["kv_tokens"] < before["stats"]["kv_tokens"]
    assert after["compactions"][0]["start"] == report["start"]


def test_a_conversation_goes_on_after_it_was_compacted(http: httpx.Client) -> None:
    text = "short enough to be exact, long enough to be compacted. " * 3
    first = say(http, text).json()
    http.post(f"{SESSIONS}/tea/compact", json={"fraction": 0.8})
    told = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "and?"},
    ]
    second = say(http, "", messages=told).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["total_tokens"]


def test_compacting_an_empty_conversation_is_a_conflict(http: httpx.Client) -> None:
    say(http, "hi")
    assert http.post(f"{SESSIONS}/tea/compact", json={"fraction": 1}).status_code == 200
    answer = http.post(f"{SESSIONS}/tea/compact", json={"fraction": 1})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "nothing_to_compact"


def test_a_fork_goes_its_own_way(http: httpx.Client) -> None:
    say(http, "hello there")
    assert http.post(f"{SESSIONS}/tea/fork", json={"id": "coffee"}).status_code == 201
    assert http.post(f"{SESSIONS}/tea/fork", json={"id": "coffee"}).status_code == 409
    assert http.delete(f"{SESSIONS}/tea").json() == {"id": "tea", "object": "memory.session", "deleted": True}
    assert [entry["id"] for entry in http.get(SESSIONS).json()["data"]] == ["coffee"]
    assert http.get(f"{SESSIONS}/coffee").json()["stats"]["logical_tokens"] > 0


def test_an_unknown_session_is_not_found(http: httpx.Client) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/compact"), ("POST", "/fork")):
        answer = http.request(method, f"{SESSIONS}/nothing{path}", json={"id": "x"} if path == "/fork" else {})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "session_not_found"


def test_names_with_slashes_and_accents_work(http: httpx.Client) -> None:
    say(http, "hello", "Zoë/2024 ☕")
    assert http.get(SESSIONS).json()["data"][0]["id"] == "Zoë/2024 ☕"
    assert http.get(f"{SESSIONS}/Zo%C3%AB%2F2024%20%E2%98%95").status_code == 200


@pytest.mark.usefixtures("looking_back")
def test_a_conversation_can_be_inspected_after_a_restart(new_server: NewServer, tmp_path: Path) -> None:
    views = []
    for _ in range(2):
        with new_server(store=tmp_path / "own") as server, server.http() as http:
            if not views:
                say(http, LONG)
            views.append(http.get(f"{SESSIONS}/tea").json())
    for view in views:
        assert view["recalled"]
        view["stats"].pop("kv_bytes")  # spare room is not saved
        view["stats"].pop("originals_bytes")  # they stay in the saved file until they are needed
        for layer in view["layers"]:
            layer.pop("bytes")
    assert views[0] == views[1]


def test_a_hint_in_a_header_names_the_conversation(http: httpx.Client) -> None:
    asked = {"messages": [{"role": "user", "content": "hello"}]}
    http.post("/v1/chat/completions", json=asked, headers={"X-Conversation-Id": "from a header"})
    http.post("/v1/chat/completions", json={**asked, "user": "somebody"})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "no hint"}]})
    names = [entry["id"] for entry in http.get(SESSIONS).json()["data"]]
    assert {"from a header", "somebody"} <= {*names}
    assert any(name.startswith("auto-") for name in names)


def test_metrics_count_tokens_answers_and_compactions(http: httpx.Client) -> None:
    usage = say(http, LONG).json()["usage"]
    view = http.get(f"{SESSIONS}/tea").json()
    text = http.get("/metrics").text
    assert f"am_memory_prompt_tokens_total {float(usage['prompt_tokens'])}" in text
    assert f"am_memory_compactions_total {float(view['stats']['num_compactions'])}" in text
    assert f"am_memory_kv_bytes {float(view['stats']['kv_bytes'])}" in text
    assert 'am_memory_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text


@pytest.mark.usefixtures("looking_back")
def test_an_answer_tells_what_was_looked_up_for_it(http: httpx.Client) -> None:
    memory = say(http, LONG).json()["am_memory"]
    (span,) = memory["looked_up"]
    assert memory["conversation"] == "tea"
    assert memory["stats"]["recalled_tokens"] == span["end"] - span["start"] == 20
    assert span["score"] == 1.23
    assert span["text"] in f"<|im_start|>user\n{LONG}"


@pytest.mark.usefixtures("looking_back")
def test_a_view_and_the_metrics_show_what_is_exact_again(http: httpx.Client) -> None:
    (span,) = say(http, LONG).json()["am_memory"]["looked_up"]
    view = http.get(f"{SESSIONS}/tea").json()
    assert view["recalled"] == [{"start": span["start"], "end": span["end"]}]
    at_rest = sum(part["slots"] for part in view["segments"])
    assert at_rest < view["stats"]["kv_tokens"] <= at_rest + view["stats"]["recalled_tokens"]
    (entry,) = http.get(SESSIONS).json()["data"]
    assert entry["stats"]["recalled_tokens"] == view["stats"]["recalled_tokens"] == 20
    text = http.get("/metrics").text
    assert "am_memory_lookups_total 1.0" in text
    (recalled,) = re.findall(r"^am_memory_recalled_tokens_total ([\d.]+)$", text, re.MULTILINE)
    assert float(recalled) in (20, 40)  # twice where a compaction put the page away for a moment


def test_a_server_without_recall_looks_nothing_up(new_server: NewServer) -> None:
    with new_server(policy=POLICY.with_changes(recall_tokens=0)) as server, server.http() as http:
        answer = say(http, LONG).json()
        view = http.get(f"{SESSIONS}/tea").json()
    assert answer["am_memory"]["looked_up"] == view["recalled"] == []
    assert view["stats"]["recalled_tokens"] == 0


def test_the_page_loads_nothing_from_other_hosts(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("style.css", "app.js", "api.js", "chat.js", "markdown.js", "memory.js", "store.js", "icon.svg"):
        assert http.get(f"/static/{path}").status_code == 200


def test_a_conversation_deleted_while_it_is_answered_does_not_come_back(http: httpx.Client, tmp_path: Path) -> None:
    say(http, "the owl's secret")
    asked = {"messages": [{"role": "user", "content": "and then?"}], "metadata": {"conversation_id": "tea"}}
    with http.stream("POST", "/v1/chat/completions", json={**asked, "stream": True, "max_tokens": 64}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert http.delete(f"{SESSIONS}/tea").json()["deleted"]
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert http.get(SESSIONS).json()["data"] == []
    assert http.delete(f"{SESSIONS}/tea").status_code == 404
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("is_new", [True, False])
def test_a_conversation_deleted_while_its_request_waits_does_not_come_back(
    new_server: NewServer, tmp_path: Path, is_new: bool
) -> None:
    with new_server(store=tmp_path, max_active=1) as server, server.http() as http, ThreadPoolExecutor() as pool:
        if not is_new:
            say(http, "the owl's secret")
        scheduler = server.service.scheduler
        scheduler._streams.active[ANONYMOUS] += 1  # another answer of this owner
        waiting = pool.submit(say, http, "the owl's other secret")
        until(lambda: scheduler.num_waiting == 1, 20)
        assert http.delete(f"{SESSIONS}/tea").status_code == 200
        assert http.delete(f"{SESSIONS}/tea").status_code == 404
        with scheduler._changed:
            scheduler._streams.release(ANONYMOUS)
            scheduler._admit(scheduler._streams)
        assert waiting.result().status_code == 200
        assert http.get(SESSIONS).json()["data"] == []
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
        say(http, "what is said after the deletion is kept")
        assert [entry["id"] for entry in http.get(SESSIONS).json()["data"]] == ["tea"]


@pytest.mark.parametrize("name", ["x" * 201, "two\nlines"])
def test_an_invalid_name_for_a_fork_is_refused_as_its_id(http: httpx.Client, name: str) -> None:
    say(http, "hello")
    error = http.post(f"{SESSIONS}/tea/fork", json={"id": name}).json()["error"]
    assert error["param"] == "id"
    assert "cannot name a conversation: give 1 to 200" in error["message"]


def test_an_unreadable_session_is_listed_and_can_be_deleted(new_server: NewServer, tmp_path: Path) -> None:
    with new_server(store=tmp_path) as server, server.http() as http:
        say(http, "hello")
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with new_server(store=tmp_path) as server, server.http() as http:
        assert [entry["id"] for entry in http.get(SESSIONS).json()["data"]] == ["tea"]
        unreadable = http.get(f"{SESSIONS}/tea")
        assert unreadable.status_code == 409
        assert "'tea' cannot be read: DELETE removes it" in unreadable.json()["error"]["message"]
        assert http.delete(f"{SESSIONS}/tea").status_code == 200
        assert http.get(SESSIONS).json()["data"] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_text_of_a_segment_is_shown_up_to_a_bound(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    say(http, LONG)
    part = http.get(f"{SESSIONS}/tea").json()["segments"][2]
    shown = http.post(f"{SESSIONS}/tea/text", json={"start": part["start"], "end": part["end"]}).json()
    assert (shown["start"], shown["end"]) == (part["start"], part["end"])
    assert shown["text"] in LONG
    monkeypatch.setattr("am_memory_server.memory_view.MAX_TEXT_TOKENS", 10)
    shown = http.post(f"{SESSIONS}/tea/text", json={"start": part["start"], "end": part["end"]}).json()
    assert shown["end"] == part["start"] + 10
    for span in ({"start": 5, "end": 5}, {"start": 0, "end": 10**9}):
        assert "give a span within" in http.post(f"{SESSIONS}/tea/text", json=span).json()["error"]["message"]
    assert http.post(f"{SESSIONS}/tea/text", json={"start": -1, "end": 5}).status_code == 400
    assert http.post(f"{SESSIONS}/coffee/text", json={"start": 0, "end": 5}).status_code == 404


def test_a_search_finds_compacted_tokens_and_a_recall_makes_them_exact(new_server: NewServer, tmp_path: Path) -> None:
    """They are still exact when another server resumes the conversation. Another key sees nothing of it."""
    keys = ["mine-mine", "yours-yours"]
    with new_server(store=tmp_path, api_keys=keys) as server, server.http("mine-mine") as http:
        say(http, LONG)
        tokens = http.get(f"{SESSIONS}/tea").json()["stats"]["logical_tokens"]
        found = http.post(f"{SESSIONS}/tea/search", json={"query": "the cache", "top": 2}).json()["data"]
        assert 0 < len(found) <= 2
        assert found[0]["text"]
        assert found[0]["score"] >= found[-1]["score"]
        start = found[0]["start"]
        view = http.post(f"{SESSIONS}/tea/recall", json={"start": start, "end": start + 9}).json()
        assert any(page["start"] <= start and page["end"] >= start + 9 for page in view["recalled"])
        assert view["stats"]["logical_tokens"] == tokens
        assert view["stats"]["kv_tokens"] <= POLICY.trigger_tokens
        with server.http("yours-yours") as other:
            assert other.post(f"{SESSIONS}/tea/recall", json={"start": 5, "end": 9}).status_code == 404
            assert other.post(f"{SESSIONS}/tea/search", json={"query": "the cache"}).status_code == 404
    with new_server(store=tmp_path, api_keys=keys) as server, server.http("mine-mine") as http:
        assert http.get(f"{SESSIONS}/tea").json()["recalled"] == view["recalled"]


def test_a_recall_that_cannot_fit_says_so_and_changes_nothing(http: httpx.Client) -> None:
    say(http, LONG)
    before = http.get(f"{SESSIONS}/tea").json()
    refused = http.post(f"{SESSIONS}/tea/recall", json={"start": 3, "end": before["stats"]["logical_tokens"] - 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert http.get(f"{SESSIONS}/tea").json()["recalled"] == before["recalled"]
    assert http.post(f"{SESSIONS}/tea/search", json={"query": "x" * 5000}).status_code == 400


def test_a_stream_says_how_far_a_compaction_is(http: httpx.Client) -> None:
    shown = say(http, LONG, stream=True, stream_options={"include_memory": True}).text
    steps = re.findall(r'"event":"compaction_progress","stage":"fit","done":(\d+),"total":(\d+)', shown)
    assert steps[-1][0] == steps[-1][1]
    assert 0 < len(steps) <= 3 * shown.count('"event":"compacted"')
