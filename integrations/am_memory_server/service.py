"""State that all endpoints share: the memory and its conversations, the scheduler, the metrics. Knows no HTTP.

Work on sessions runs on the scheduler's device thread, in short steps; work that needs no device, on its host threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from am_memory.conversations.branch import Branch
from am_memory.conversations.texts import Texts
from am_memory.conversations.threads import Threads
from am_memory.errors import SessionChanged, SessionDeleted, StorageError
from am_memory.events import CompactionFinished, CompactionReport, Event, Listener
from am_memory.memory import Memory
from am_memory.session.batch import Batch
from am_memory.session.saving import snapshot
from am_memory.session.session import Session
from am_memory.session.stepwise import Stepwise
from am_memory_server.errors import logger
from am_memory_server.jobs import Steps, TurnKey
from am_memory_server.kept_responses import KeptResponses
from am_memory_server.metrics import Metrics, Sizes
from am_memory_server.scheduler import Scheduler
from am_memory_server.settings import ServerSettings

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
METADATA_KEY = "am_memory.server"
TEXTS_SHARE = 0.25
"""Share of the bytes for caches that plain completions get. They are not saved."""


class Closeable(Protocol[T_co]):
    """An iterator that can be closed before its end."""

    def __next__(self) -> T_co: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class AnyStep:
    """Several steps of one job, of which it awaits any."""

    steps: tuple[Stepwise[Any], ...]

    @property
    def is_ready(self) -> bool:
        """Whether one of them is made, so that the job can go on."""
        return any(step.is_ready for step in self.steps)

    @property
    def has_news(self) -> bool:
        """Whether one of them is made, or has events to publish."""
        return any(step.has_news for step in self.steps)


class Service:
    """One model with all of its conversations.

    Args:
        memory: if it has a store, conversations outlive the server.
    """

    def __init__(self, memory: Memory, settings: ServerSettings) -> None:
        self.memory, self.settings = memory, settings
        texts_bytes = int(settings.max_session_bytes * TEXTS_SHARE)
        num_bytes = settings.max_session_bytes - texts_bytes
        self.threads = Threads(memory, max_bytes=num_bytes, max_branches=settings.max_sessions)
        self.texts = Texts(memory, max_bytes=max(texts_bytes, 1))
        self.responses = KeptResponses(settings.max_responses)
        self.metrics = Metrics(self.sizes)
        self._batch = Batch(max_bytes=settings.max_answer_bytes)
        self.scheduler = Scheduler(
            max_active=settings.max_active,
            max_queued=settings.max_queued,
            together=self._step_together,
        )
        self.created = int(time.time())

    def sizes(self) -> Sizes:
        """The current figures, for the metrics."""
        kept = [branch.session.stats for branch in self.threads.all_branches()]
        return Sizes(
            active=self.scheduler.num_active,
            waiting=self.scheduler.num_waiting,
            sessions=len(kept),
            kv_bytes=sum(stats.kv_bytes for stats in kept) + self.texts.kv_bytes,
            logical_tokens=sum(stats.logical_tokens for stats in kept),
            kv_tokens=sum(stats.kv_tokens for stats in kept),
        )

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Send events to the listener and to the metrics, during one step of a job."""
        with self.memory.listening(listener), self.memory.listening(self.metrics.on_event):
            yield

    def with_events(self, steps: Closeable[T], listener: Listener) -> Generator[T, None, None]:
        """The same steps, of one job; their events go to the listener and to the metrics, and no other job's do."""
        try:
            while True:
                with self.listening(listener):
                    try:
                        step = next(steps)
                    except StopIteration:
                        return
                yield step
        finally:
            with self.listening(listener):
                steps.close()

    def awaiting(self, steps: Sequence[Stepwise[Any]], listener: Listener) -> Steps[None]:
        """Await any of these steps, which are made together with those of other jobs, unless one is made already.

        Their events go to the listener when they happen.
        """
        awaited = AnyStep(tuple(steps))
        if awaited.is_ready:
            return
        yield awaited if steps else None
        while awaited.has_news and not awaited.is_ready:
            with self.listening(listener):
                for step in steps:
                    step.send_events()
            yield awaited

    def _step_together(self, awaited: Sequence[AnyStep], keys: Sequence[TurnKey]) -> None:
        keyed = [(step, key) for each, key in zip(awaited, keys, strict=True) for step in each.steps]
        self._batch.step([step for step, _ in keyed], [key for _, key in keyed])

    def save_or_log(self, save: Callable[[], None]) -> None:
        """Save a conversation. If that fails, log it: the conversation stays in memory, and its answer is sent."""
        try:
            save()
        except (SessionChanged, SessionDeleted) as error:  # another process has saved or deleted it: not a failure
            logger.info("%s", error)
        except StorageError as error:
            self.metrics.failed_saves.inc()
            logger.error("a conversation could not be saved, and is kept in memory only: %s", error)


class CompactionLog:
    """Collects the compaction reports of one conversation, and writes them into the metadata of its session.

    Args:
        session: the name that the conversation's events carry.
    """

    def __init__(self, session: str) -> None:
        self.session = session
        self.unwritten: list[dict[str, Any]] = []

    def on_event(self, event: Event) -> None:
        """A listener of the memory."""
        if isinstance(event, CompactionFinished) and event.session == self.session:
            self.unwritten.append(report_dict(event.report))

    def write(self, session: Session) -> None:
        """Add the reports and the time to the session's metadata; drop the reports of compactions that were undone."""
        kept = {**session.metadata.get(METADATA_KEY, {}), "updated": time.time()}
        made = {(record.plan.newest.start, record.plan.newest.end) for record in snapshot(session).records}
        reports = [*kept.get("compactions", []), *self.unwritten]
        kept["compactions"] = [report for report in reports if (report["start"], report["end"]) in made]
        self.unwritten = []
        session.metadata[METADATA_KEY] = kept


def report_dict(report: CompactionReport) -> dict[str, Any]:
    """A report for JSON, with the time."""
    fields = {name: value for name, value in asdict(report).items() if name != "session"}
    return {**fields, "seconds": report.seconds, "created": time.time()}


def compaction_reports(session: Session) -> list[dict[str, Any]]:
    """The reports in a session's metadata, oldest first."""
    reports: list[dict[str, Any]] = session.metadata.get(METADATA_KEY, {}).get("compactions", [])
    return reports


def last_used(branch: Branch) -> float:
    """When a branch was written last, in seconds since the epoch; 0 for a branch that another program made."""
    return float(branch.session.metadata.get(METADATA_KEY, {}).get("updated", 0.0))
