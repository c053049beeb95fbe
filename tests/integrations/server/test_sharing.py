"""Many clients: separation of keys, turns on the device, limits, and clients that go away."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import openai
import pytest
from am_memory_server import ServerSettings
from serving import NewServer, Server, until

from am_memory.compaction.job import CompactionJob
from am_memory.errors import InvalidInput

ALICE, BOB = "key-of-alice", "key-of-bob"
HELLO = {"role": "user", "content": "hello, this is a secret that nobody else may see"}


def ask(client: openai.OpenAI, text: str, **options: Any) -> Any:
    messages: list[Any] = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, **options})


def test_one_key_sees_nothing_of_another(new_server: NewServer, tmp_path: Path) -> None:
    with new_server(api_keys=[ALICE, BOB], store=tmp_path) as server:
        asked: dict[str, Any] = {"model": "tiny", "messages": [HELLO], "metadata": {"conversation_id": "one"}}
        with server.http(ALICE) as alice, server.http(BOB) as bob:
            assert alice.post("/v1/chat/completions", json=asked).status_code == 200
            again = alice.post("/v1/chat/completions", json=asked).json()
            other = bob.post("/v1/chat/completions", json={**asked, "metadata": {"conversation_id": "two"}}).json()
            assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert [entry["id"] for entry in alice.get("/v1/memory/sessions").json()["data"]] == ["one"]
            assert [entry["id"] for entry in bob.get("/v1/memory/sessions").json()["data"]] == ["two"]
            assert bob.get("/v1/memory/sessions/one").status_code == 404
            assert bob.delete("/v1/memory/sessions/one").status_code == 404
            assert bob.post("/v1/memory/sessions/one/fork", json={"id": "mine"}).status_code == 404
            assert alice.get("/v1/memory/sessions/one").status_code == 200


def test_plain_prompts_of_one_key_are_not_cached_for_another(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE, BOB]) as server:
        asked = {"model": "tiny", "prompt": "a plain text, which is a secret as well"}
        cached = []
        for key in (ALICE, ALICE, BOB):
            with server.http(key) as http:
                usage = http.post("/v1/completions", json=asked).json()["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[2] == 0 < cached[1]


def test_a_name_cannot_reach_into_the_conversations_of_another(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE, BOB]) as server:
        with server.http(ALICE) as alice:
            asked = {"model": "tiny", "messages": [HELLO], "metadata": {"conversation_id": "one"}}
            alice.post("/v1/chat/completions", json=asked)
        thread = server.service.threads.names()[0]
        with server.http(BOB) as bob:
            for name in (thread, f"../{thread}", f"/{thread}", "../one"):
                assert bob.get(f"/v1/memory/sessions/{name}").status_code == 404


def test_without_a_valid_key_nothing_is_answered(new_server: NewServer) -> None:
    with new_server(api_keys=[ALICE]) as server:
        for key in (None, "key-of-mallory"):
            with server.http(key) as http:
                for path in ("/v1/models", "/v1/memory/sessions", "/metrics"):
                    answer = http.get(path)
                    assert answer.status_code == 401
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                assert http.get("/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("key-of-mallory").models.list()


def test_a_web_page_cannot_reach_the_server_under_another_name(server: Server) -> None:
    with server.http() as http:
        answer = http.get("/v1/models", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_host"


def test_a_server_is_not_open_to_other_machines_by_accident() -> None:
    with pytest.raises(InvalidInput, match="no API key"):
        ServerSettings(host="0.0.0.0")
    assert ServerSettings(host="0.0.0.0", allow_anonymous=True).host == "0.0.0.0"


def test_an_error_in_the_settings_does_not_show_the_key() -> None:
    with pytest.raises(InvalidInput) as refused:
        ServerSettings(api_keys=("short",))
    assert "short" not in str(refused.value).replace("shorter", "")


def test_answers_are_generated_in_turn(new_server: NewServer) -> None:
    """A short answer does not wait for the end of a long one that came first."""
    with new_server() as server:
        client, seen = server.client(), []

        def long() -> None:
            for _ in ask(client, "tell me everything", max_tokens=400, stream=True):
                seen.append("long")

        thread = threading.Thread(target=long)
        thread.start()
        until(lambda: len(seen) > 3)
        ask(client, "write a short one", max_tokens=4)
        num_before = len(seen)
        thread.join()
        assert num_before < len(seen)


def test_concurrent_answers_get_their_tokens_in_one_pass(new_server: NewServer, pass_sizes: list[int]) -> None:
    with new_server(max_active=6, max_tokens=40) as server, ThreadPoolExecutor(6) as pool:
        client = server.client()
        list(pool.map(lambda number: ask(client, f"question number {number}"), range(6)))
    assert max(pass_sizes) >= 4


def test_a_compaction_of_one_conversation_stops_no_other(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is in the middle of a prompt or of an answer; and a new conversation begins meanwhile."""
    long = "tell me of the owl and of the sea " * 14
    with new_server() as server:
        expected = ask(server.client(), long, max_tokens=6).choices[0].message.content
    begun, release, run = threading.Event(), threading.Event(), CompactionJob.run

    def held(job: CompactionJob, *args: Any) -> Any:
        begun.set()
        assert release.wait(60)
        return run(job, *args)

    monkeypatch.setattr(CompactionJob, "run", held)
    with new_server() as server, ThreadPoolExecutor(1) as pool:
        client = server.client()
        compacting = pool.submit(ask, client, long, max_tokens=6)
        assert begun.wait(60)
        assert ask(client, "write a short one", max_tokens=12).usage.completion_tokens > 0
        assert not compacting.done()
        release.set()
        assert compacting.result().choices[0].message.content == expected


def test_a_client_that_leaves_stops_its_compaction(new_server: NewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It once went on for nobody, beside the answers of others."""
    begun, run, ends = threading.Event(), CompactionJob.run, list[type]()

    def noted(job: CompactionJob, progress: Any) -> Any:
        begun.set()
        try:
            while True:  # until it is stopped
                progress("fit", 0, 1)
                sleep(0.001)
        except BaseException as error:
            ends.append(type(error))
            raise

    monkeypatch.setattr(CompactionJob, "run", noted)
    with new_server() as server:
        stream = ask(server.client(), "tell me of the owl and of the sea " * 14, stream=True)
        assert begun.wait(60)
        stream.close()
        until(lambda: ends)
        until(lambda: server.service.scheduler.num_active == 0)
        monkeypatch.setattr(CompactionJob, "run", run)
        assert ask(server.client(), "write a short one", max_tokens=2).usage.completion_tokens == 2
    assert ends == [CancelledError]


def test_concurrent_answers_equal_single_ones(new_server: NewServer) -> None:
    with new_server(max_active=3, max_tokens=12) as server, ThreadPoolExecutor(8) as pool:
        client = server.client()
        texts = [f"question number {number}" for number in range(8)]
        together = list(pool.map(lambda text: ask(client, text).choices[0].message.content, texts))
    with new_server(max_tokens=12) as server:
        client = server.client()
        assert together == [ask(client, text).choices[0].message.content for text in texts]


def test_too_many_waiting_requests_get_a_429(new_server: NewServer) -> None:
    with new_server(max_active=1, max_queued=1) as server:
        client = server.client()
        streams = [ask(client, "tell me everything", max_tokens=2000, stream=True)]
        waiting = threading.Thread(target=lambda: streams.append(ask(client, "two", max_tokens=4, stream=True)))
        waiting.start()
        until(lambda: server.service.scheduler.num_waiting == 1)
        with pytest.raises(openai.RateLimitError, match="are waiting"):
            ask(client, "three")
        streams[0].close()
        waiting.join(timeout=30)
        assert len(list(streams[1])) >= 2


def test_a_client_that_goes_away_stops_its_answer(new_server: NewServer) -> None:
    with new_server() as server:
        scheduler, client = server.service.scheduler, server.client()
        stream = ask(client, "tell me everything", max_tokens=16000, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: scheduler.num_active == 0)
        with pytest.raises(openai.APITimeoutError):
            ask(client.with_options(timeout=0.5), "tell me everything", max_tokens=16000)
        until(lambda: scheduler.num_active == 0)
        with server.http() as http:
            metrics = http.get("/metrics").text
        assert "am_memory_cancelled_total 2.0" in metrics
        assert server.service.threads.names() == []


def test_a_request_that_is_too_large_is_refused(new_server: NewServer) -> None:
    with new_server(max_body_bytes=1000) as server, server.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 2000}]})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_evicted_conversations_come_back_from_the_store(new_server: NewServer, tmp_path: Path) -> None:
    with new_server(max_sessions=2, store=tmp_path) as server:
        client = server.client()
        answers = [ask(client, f"conversation {number}") for number in range(5)]
        assert len(server.service.threads.all_branches()) <= 2
        assert len(server.service.threads.names()) == 5
        told: list[Any] = [{"role": "user", "content": "conversation 0"}, answers[0].choices[0].message, HELLO]
        again = client.chat.completions.create(model="tiny", messages=told)
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens == answers[0].usage.total_tokens


def test_the_bytes_of_all_caches_are_bounded(new_server: NewServer, tmp_path: Path) -> None:
    limit = 400_000  # a few conversations of the tiny model; three quarters of it are for chats
    with new_server(max_session_bytes=limit, store=tmp_path) as server:
        client, kept = server.client(), []
        for number in range(12):
            ask(client, f"conversation {number}, with a few words more than that")
            kept.append(sum(branch.session.stats.kv_bytes for branch in server.service.threads.all_branches()))
        assert limit * 0.3 < max(kept) <= limit * 0.75
        assert len(server.service.threads.all_branches()) < 12 == len(server.service.threads.names())


def test_only_named_origins_may_call(new_server: NewServer, server: Server) -> None:
    origin = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    with server.http() as http:
        assert "access-control-allow-origin" not in http.options("/v1/chat/completions", headers=origin).headers
    with new_server(cors_origins=["https://chat.example"]) as open_server, open_server.http() as http:
        allowed = http.options("/v1/chat/completions", headers=origin).headers
        assert allowed["access-control-allow-origin"] == "https://chat.example"


def test_a_running_answer_finishes_on_shutdown(new_server: NewServer, tmp_path: Path) -> None:
    chunks: list[Any] = []
    with new_server(store=tmp_path) as server:
        stream = iter(ask(server.client(), "finish this", max_tokens=60, stream=True))
        chunks.append(next(stream))
        reader = threading.Thread(target=lambda: chunks.extend(stream))
        reader.start()
    reader.join()
    assert chunks[-1].choices[0].finish_reason == "length"
    with new_server(store=tmp_path) as server:
        assert len(server.service.threads.names()) == 1
