"""Requests that go to all replicas: their answers are merged into one. Knows no router."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class ReplicaAnswer:
    """The HTTP answer of one replica."""

    replica: str
    status: int
    headers: Headers
    body: bytes

    def with_body(self, body: bytes) -> ReplicaAnswer:
        """The same answer with another body."""
        headers = [(name, value) for name, value in self.headers if name.lower() != b"content-length"]
        return ReplicaAnswer(self.replica, self.status, [*headers, (b"content-length", b"%d" % len(body))], body)


def is_broadcast(method: str, path: str) -> bool:
    """Whether a request goes to all replicas: deletions, the list of sessions, and the metrics."""
    is_deletion = method == "DELETE" and path.startswith("/v1/memory/sessions/")
    return is_deletion or (method == "GET" and path in ("/metrics", "/v1/memory/sessions"))


def merged(path: str, answers: Sequence[ReplicaAnswer]) -> ReplicaAnswer:
    """One answer for all of them; an error only if no replica succeeded."""
    best = min(answers, key=lambda answer: answer.status)
    sound = [answer for answer in answers if answer.status == best.status == 200]
    match path:
        case "/metrics" if sound:
            return best.with_body(_metrics(sound))
        case "/v1/memory/sessions" if sound:
            return best.with_body(_sessions(answer.body for answer in sound))
    return best


def _sessions(bodies: Iterable[bytes]) -> bytes:
    """The sessions of all replicas; of several with one name, the longest."""
    longest: dict[str, Any] = {}
    for body in bodies:
        for entry in json.loads(body)["data"]:
            if entry["id"] not in longest or _num_tokens(entry) > _num_tokens(longest[entry["id"]]):
                longest[entry["id"]] = entry
    return json.dumps({"object": "list", "data": [longest[name] for name in sorted(longest)]}).encode()


def _num_tokens(entry: dict[str, Any]) -> int:
    return -1 if entry["stats"] is None else int(entry["stats"]["logical_tokens"])


def _metrics(answers: Iterable[ReplicaAnswer]) -> bytes:
    """The metrics of all replicas, with a label `replica`."""
    families: dict[str, Metric] = {}
    for answer in answers:
        for family in text_string_to_metric_families(answer.body.decode()):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [_labelled(sample, answer.replica) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Families(families.values()))
    return generate_latest(registry)


def _labelled(sample: Sample, replica: str) -> Sample:
    return sample._replace(labels={**sample.labels, "replica": replica})


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families
