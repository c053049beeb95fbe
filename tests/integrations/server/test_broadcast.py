"""Requests to all replicas: their answers become one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from am_memory_server.broadcast import ReplicaAnswer, is_broadcast, merged
from am_memory_server.metrics import Metrics, Sizes

SESSIONS = "/v1/memory/sessions"


def whole(body: bytes, *, status: int = 200, replica: str = "a") -> ReplicaAnswer:
    headers = [(b"content-length", b"%d" % len(body)), (b"x-other", b"kept")]
    return ReplicaAnswer(replica, status, headers, body)


def listed(*entries: dict[str, Any]) -> ReplicaAnswer:
    return whole(json.dumps({"object": "list", "data": entries}).encode())


def test_metrics_get_a_label_for_each_replica() -> None:
    answers = []
    for replica, number in (("one", 1), ("two", 2)):
        metrics = Metrics(lambda: Sizes(0, 0, 0, 7, 0, 0.0))
        metrics.generated_tokens.inc(number)
        metrics.requests.labels("/v1/models", 200).inc()
        metrics.answer_seconds.observe(number)
        answers.append(whole(metrics.text(), replica=replica))
    answer = merged("/metrics", answers)
    text = answer.body.decode()
    assert 'am_memory_generated_tokens_total{replica="one"} 1.0' in text
    assert 'am_memory_generated_tokens_total{replica="two"} 2.0' in text
    assert 'am_memory_requests_total{replica="one",route="/v1/models",status="200"} 1.0' in text
    assert 'am_memory_answer_seconds_bucket{le="1.0",replica="two"} 0.0' in text
    assert 'am_memory_kv_bytes{replica="two"} 7.0' in text
    assert text.count("# TYPE am_memory_generated_tokens_total counter") == 1
    assert dict(answer.headers) == {b"content-length": b"%d" % len(answer.body), b"x-other": b"kept"}


def test_a_session_of_several_replicas_is_listed_once_with_the_longest() -> None:
    entries = [{"id": name, "stats": {"logical_tokens": size}} for name, size in (("b", 3), ("b", 5), ("a", 1))]
    stored = {"id": "a", "stats": None}
    answer = merged(SESSIONS, [listed(entries[0], stored), listed(entries[1], entries[2])])
    assert json.loads(answer.body) == {"object": "list", "data": [entries[2], entries[1]]}


def test_the_answer_is_an_error_only_if_no_replica_succeeded() -> None:
    fine, missing = whole(b"{}"), whole(b"none", status=404)
    assert merged(f"{SESSIONS}/tea", [missing, fine]) == fine
    assert merged(f"{SESSIONS}/tea", [missing, missing]) == missing
    assert merged("/metrics", [whole(b"no key", status=401)]).status == 401


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("DELETE", f"{SESSIONS}/tea", True),
        ("GET", SESSIONS, True),
        ("GET", "/metrics", True),
        ("GET", f"{SESSIONS}/tea", False),
        ("POST", f"{SESSIONS}/tea/compact", False),
        ("POST", "/v1/chat/completions", False),
    ],
)
def test_deletions_lists_and_metrics_go_to_all_replicas(method: str, path: str, expected: bool) -> None:
    assert is_broadcast(method, path) is expected
