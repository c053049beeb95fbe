"""One key that sends as many requests as it can, and how many steps another key has to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from am_memory_server import jobs
from am_memory_server.access import owner_of_key
from serving import NewServer, Server, until

from am_memory.conversations import prompts
from am_memory.engines.transformers import TransformersEngine
from am_memory.storage.store import Store

MALLORY, ALICE, OPERATOR = "key-of-mallory", "key-of-alice", "key-of-operator"
KEYS = {"api_keys": [MALLORY, ALICE], "operator_keys": [OPERATOR]}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The owner of each step, and whether its job continues without waiting for a host call."""
    seen: list[tuple[str, bool]] = []
    step = jobs.QueuedJob.step

    def noted(job: jobs.QueuedJob) -> bool:
        is_last = step(job)
        seen.append((job.owner, not is_last and job.host_call is None))
        return is_last

    monkeypatch.setattr(jobs.QueuedJob, "step", noted)
    return seen


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **options}


@contextmanager
def flood(server: Server) -> Iterator[None]:
    """Long answers, forks, compactions and views of one key, until the end of the block."""
    is_over = threading.Event()

    def stream(number: int) -> None:
        with server.http(MALLORY) as http:
            body = asked(f"tell me everything {number}", max_tokens=16000, stream=True)
            with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                for _ in answer.iter_lines():
                    if is_over.is_set():
                        return

    def call(number: int) -> None:
        with server.http(MALLORY) as http:
            named = {"metadata": {"conversation_id": f"of mallory {number}"}}
            http.post("/v1/chat/completions", json=asked("a few words, to be compacted again and again", **named))
            path, count = f"/v1/memory/sessions/of mallory {number}", 0
            while not is_over.is_set():
                http.post(f"{path}/compact", json={"fraction": 0.5})
                http.post(f"{path}/fork", json={"id": f"fork {number} {count}"})
                http.get(path)
                count += 1

    with ThreadPoolExecutor(24) as pool:
        flooding = [pool.submit(stream, number) for number in range(16)]
        flooding += [pool.submit(call, number) for number in range(4)]
        try:
            until(lambda: server.service.scheduler.num_active >= 2 and server.service.scheduler.num_waiting >= 4)
            yield
        finally:
            is_over.set()
        for future in flooding:
            future.cancel()


def test_during_a_flood_of_one_key_another_key_gets_a_token_in_every_pass(
    new_server: NewServer, steps: list[tuple[str, bool]]
) -> None:
    """Four long answers of one key once kept all others waiting, and its forks came before everything.

    Between two tokens of hers come the other answer's token, of the same pass, and one other step at most.
    """
    mallory, alice = owner_of_key(MALLORY), owner_of_key(ALICE)
    with new_server(max_active=2, **KEYS) as server, server.http(ALICE) as http, flood(server):
        num_before = len(steps)
        assert http.post("/v1/chat/completions", json=asked("hello", max_tokens=20)).status_code == 200
        answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 20})
        assert answer.status_code == 200
        seen = steps[num_before:]
    mine = [place for place, (owner, _) in enumerate(seen) if owner == alice]
    assert len(mine) > 40
    for place, following in zip(mine, mine[1:], strict=False):
        if seen[place][1]:  # where she waits for nothing else
            assert following - place <= 3
    assert sum(owner == mallory for owner, _ in seen) > 20


class Gate:
    """Makes work wait until `is_open` is set."""

    def __init__(self) -> None:
        self.has_come, self.is_open = threading.Event(), threading.Event()

    def passed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*values: Any, **options: Any) -> Any:
            self.has_come.set()
            assert self.is_open.wait(60)
            return work(*values, **options)

        return waiting


def test_metrics_and_lists_wait_for_no_step(
    new_server: NewServer, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    with new_server(**KEYS) as server, server.http(MALLORY) as mallory, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(engine, "forward", gate.passed(engine.forward))
        answer = pool.submit(mallory.post, "/v1/chat/completions", json=asked("hello"))
        assert gate.has_come.wait(60)
        try:
            with server.http(OPERATOR) as operator, server.http(ALICE) as alice:
                assert "am_memory_active 1.0" in operator.get("/metrics", timeout=30).text
                assert alice.get("/v1/memory/sessions", timeout=30).json()["data"] == []
                assert alice.get("/v1/models", timeout=30).status_code == 200
                assert alice.delete("/v1/memory/sessions/none", timeout=30).status_code == 404
        finally:
            gate.is_open.set()
        assert answer.result().status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_encoding_a_long_prompt_delays_nobody(
    new_server: NewServer, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    gate, encode = Gate(), engine.encode

    def slow(text: str, **options: Any) -> list[int]:
        return gate.passed(encode)(text, **options) if "long" in text else encode(text, **options)

    monkeypatch.setattr(engine, "encode", slow)
    monkeypatch.setattr(prompts, "SHORT_CHARS", 0)
    long = asked("long") if "chat" in path else {"model": "tiny", "prompt": "long"}
    with new_server(**KEYS) as server, server.http(MALLORY) as mallory, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(mallory.post, path, json=long)
        assert gate.has_come.wait(60)
        try:
            with server.http(ALICE) as alice:
                assert alice.post("/v1/chat/completions", json=asked("hello"), timeout=30).status_code == 200
        finally:
            gate.is_open.set()
        assert answer.result().status_code == 200


def test_a_slow_store_delays_no_step(new_server: NewServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    with new_server(store=tmp_path, **KEYS) as server, server.http(MALLORY) as mallory, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(Store, "save", gate.passed(Store.save))
        answer = pool.submit(mallory.post, "/v1/chat/completions", json=asked("hello"))
        assert gate.has_come.wait(60)
        try:
            with server.http(ALICE) as alice, server.http(OPERATOR) as operator:
                body = asked("hello", max_tokens=4, stream=True)
                with alice.stream("POST", "/v1/chat/completions", json=body) as chunks:
                    assert '"delta"' in next(chunks.iter_lines())
                assert alice.post("/v1/completions", json={"prompt": "hello"}).status_code == 200
                assert operator.get("/metrics").status_code == 200
        finally:
            gate.is_open.set()
        assert answer.result().status_code == 200


def test_no_step_grows_with_the_number_of_messages(
    new_server: NewServer, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, bool]]
) -> None:
    """Every prefix of a conversation was rendered in one step: 6,400 messages kept everybody waiting for minutes."""
    rendered: list[int] = []
    render = engine.render

    def counting(messages: Any, **options: Any) -> str:
        rendered.append(len(messages))
        return render(messages, **options)

    monkeypatch.setattr(engine, "render", counting)
    messages = [{"role": ("user", "assistant")[number % 2], "content": "a"} for number in range(401)]
    with new_server(**KEYS) as server, server.http(MALLORY) as http:
        body = {"model": "tiny", "messages": messages, "max_tokens": 1}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert sum(rendered) <= 20 * len(messages)
    num_tokens = sum(len(engine.encode(render([message]))) for message in messages)
    assert len(steps) >= num_tokens / 64  # chunks of 64 tokens


def test_waiting_requests_of_any_kind_have_a_limit_for_each_key(
    new_server: NewServer, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    with new_server(max_active=1, max_queued=6, **KEYS) as server, ThreadPoolExecutor(16) as pool:
        limits = httpx.Limits(max_connections=32)
        headers = {"Authorization": f"Bearer {MALLORY}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60, limits=limits) as http:
            named = {"metadata": {"conversation_id": "one"}}
            assert http.post("/v1/chat/completions", json=asked("hello", **named)).status_code == 200
            monkeypatch.setattr(engine, "forward", gate.passed(engine.forward))
            begun = [pool.submit(http.post, "/v1/chat/completions", json=asked("hello again"))]
            assert gate.has_come.wait(60)
            begun += [pool.submit(http.post, "/v1/memory/sessions/one/compact", json={}) for _ in range(3)]
            until(lambda: server.service.scheduler.num_waiting == 2)  # one is made at a time
            begun += [pool.submit(http.post, "/v1/completions", json={"prompt": "hello"}) for _ in range(2)]
            until(lambda: server.service.scheduler.num_waiting == 4)
            begun += [pool.submit(http.post, "/v1/memory/sessions/one/fork", json={"id": str(n)}) for n in range(2)]
            until(lambda: server.service.scheduler.num_waiting == 6)
            refused = [
                http.post("/v1/chat/completions", json=asked("one more")),
                http.post("/v1/memory/sessions/one/compact", json={}),
                http.get("/v1/memory/sessions/one"),
                http.get("/v1/memory/sessions"),
            ]
            with server.http(ALICE) as alice:
                assert alice.get("/v1/memory/sessions").status_code == 200
            gate.is_open.set()
            assert {answer.status_code for answer in refused} == {429}
            assert {future.result().status_code for future in begun} <= {200, 201, 409}
