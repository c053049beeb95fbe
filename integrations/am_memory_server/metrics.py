"""Metrics of a server, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from am_memory.events import CompactionFinished, Event, MemoryConsulted, SessionRebuilt, SpanRecalled

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PREFIX = "am_memory"
NO_ROUTE = "none"
MEDIA_TYPE = CONTENT_TYPE_LATEST


@dataclass(frozen=True)
class Sizes:
    """Figures that are measured when the metrics are read."""

    active: int
    waiting: int
    sessions: int
    kv_bytes: int
    logical_tokens: int
    kv_tokens: float


SIZES = {
    "active": "Answers being generated.",
    "waiting": "Requests that wait.",
    "sessions": "Conversations in memory; each branch counts.",
    "kv_bytes": "Bytes of their caches.",
    "logical_tokens": "Tokens of these conversations.",
    "kv_tokens": "Tokens in their caches; compact slots count as their mean over heads.",
}


class _SizesCollector(Collector):
    def __init__(self, sizes: Callable[[], Sizes]) -> None:
        self._sizes = sizes

    def collect(self) -> Iterator[Metric]:
        for name, value in asdict(self._sizes()).items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", SIZES[name], value=float(value))


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        sizes: called when the metrics are read.
    """

    def __init__(self, sizes: Callable[[], Sizes]) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, buckets=SECONDS, registry=registry)

        self.requests = counter("requests", "Requests answered.", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, cached or not.")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were in a kept cache.")
        self.generated_tokens = counter("generated_tokens", "Tokens generated.")
        self.answers = counter("answers", "Answers, by finish reason.", ("finish_reason",))
        self.cancelled = counter("cancelled", "Answers that were not finished.")
        self.compactions = counter("compactions", "Compactions.")
        self.compacted_tokens = counter("compacted_tokens", "Tokens compacted.")
        self.compaction_seconds = counter("compaction_seconds", "Seconds of compactions, by stage.", ("stage",))
        self.lookups = counter("lookups", "Times that a message or an answer looked for compacted tokens.")
        self.recalled_tokens = counter("recalled_tokens", "Compacted tokens that became exact again.")
        self.rebuilds = counter("rebuilds", "Times that a conversation was read again.")
        self.failed_saves = counter("failed_saves", "Conversations that could not be saved.")
        self.first_token_seconds = histogram("first_token_seconds", "Seconds from a request to its first token.")
        self.answer_seconds = histogram("answer_seconds", "Seconds from a request to the end of its answer.")
        registry.register(_SizesCollector(sizes))

    def on_event(self, event: Event) -> None:
        """A listener of the memory."""
        match event:
            case CompactionFinished(_, report):
                self.compactions.inc()
                self.compacted_tokens.inc(report.end - report.start)
                for stage in ("query", "score", "fit"):
                    self.compaction_seconds.labels(stage).inc(getattr(report, f"{stage}_seconds"))
            case MemoryConsulted():
                self.lookups.inc()
            case SpanRecalled(_, start, end):
                self.recalled_tokens.inc(end - start)
            case SessionRebuilt():
                self.rebuilds.inc()

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class CountRequests:
    """Middleware that counts requests by the pattern of their route: paths may hold names of conversations."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", NO_ROUTE)
                self.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)
