"""One answer of what several replicas answer to the same request. Knows no router."""

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
class Whole:
    """What one replica answers."""

    replica: str
    status: int
    headers: Headers
    body: bytes

    def with_body(self, body: bytes) -> Whole:
        headers = [(name, value) for name, value in self.headers if name.lower() != b"content-length"]
        return Whole(self.replica, self.status, [*headers, (b"content-length", b"%d" % len(body))], body)


def is_for_all(method: str, path: str) -> bool:
    """Whether a request is about all replicas: what is deleted is forgotten everywhere, and figures are of all."""
    is_deletion = method == "DELETE" and path.startswith("/v1/memory/sessions/")
    return is_deletion or (method == "GET" and path in ("/metrics", "/v1/memory/sessions"))


def gathered(path: str, answers: Sequence[Whole]) -> Whole:
    """One for all of them; an error only where none succeeded."""
    best = min(answers, key=lambda answer: answer.status)
    sound = [answer for answer in answers if answer.status == best.status == 200]
    match path:
        case "/metrics" if sound:
            return best.with_body(_metrics(sound))
        case "/v1/memory/sessions" if sound:
            return best.with_body(_sessions(answer.body for answer in sound))
    return best


def _sessions(bodies: Iterable[bytes]) -> bytes:
    """All sessions, each as the replica tells it that holds most of it."""
    found: dict[str, Any] = {}
    for body in bodies:
        for entry in json.loads(body)["data"]:
            if entry["id"] not in found or _num_tokens(entry) > _num_tokens(found[entry["id"]]):
                found[entry["id"]] = entry
    return json.dumps({"object": "list", "data": [found[name] for name in sorted(found)]}).encode()


def _num_tokens(entry: dict[str, Any]) -> int:
    return -1 if entry["stats"] is None else int(entry["stats"]["logical_tokens"])


def _metrics(answers: Iterable[Whole]) -> bytes:
    """The figures of each, told apart by a label."""
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
