"""What all endpoints share: the memory and its threads, the scheduler, the metrics. Knows no HTTP.

All that works on sessions runs on the scheduler's thread, in short steps; what needs no device goes aside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

from am_memory.conversations.branch import Branch
from am_memory.conversations.texts import Texts
from am_memory.conversations.threads import Threads
from am_memory.errors import SessionChanged, SessionDeleted, StorageError
from am_memory.events import CompactionFinished, CompactionReport, Event, Listener
from am_memory.memory import Memory
from am_memory.session.session import Session
from am_memory_server.errors import logger
from am_memory_server.metrics import Metrics, Sizes
from am_memory_server.scheduler import Scheduler
from am_memory_server.settings import ServerSettings

T = TypeVar("T")
METADATA_KEY = "am_memory.server"
TEXTS_SHARE = 0.25
"""Of the bytes for kept caches: plain texts, which are not saved."""


class Service:
    """One model with all of its conversations.

    Args:
        memory: with a store, conversations outlive the server.
    """

    def __init__(self, memory: Memory, settings: ServerSettings) -> None:
        self.memory, self.settings = memory, settings
        texts_bytes = int(settings.max_session_bytes * TEXTS_SHARE)
        num_bytes = settings.max_session_bytes - texts_bytes
        self.threads = Threads(memory, max_bytes=num_bytes, max_branches=settings.max_sessions)
        self.texts = Texts(memory, max_bytes=max(texts_bytes, 1))
        self.metrics = Metrics(self.sizes)
        self.scheduler = Scheduler(max_active=settings.max_active, max_queued=settings.max_queued)
        self.created = int(time.time())

    def sizes(self) -> Sizes:
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
        """Within one step: events go to the listener and to the metrics."""
        with self.memory.listening(listener), self.memory.listening(self.metrics.hear):
            yield

    def heard(self, steps: Iterator[T], listener: Listener) -> Generator[T, None, None]:
        """Steps of one conversation, whose events go to the listener and to the metrics; those of others do not."""
        while True:
            with self.listening(listener):
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item

    def saving(self, save: Callable[[], None]) -> None:
        """Save a conversation; one that cannot be saved stays in memory, and the answer is not lost."""
        try:
            save()
        except (SessionChanged, SessionDeleted) as error:  # what lies there is somebody's own, or nobody's any more
            logger.info("%s", error)
        except StorageError as error:
            self.metrics.failed_saves.inc()
            logger.error("a conversation is kept in memory alone: %s", error)


class Compactions:
    """The reports of one conversation's compactions, kept in its session's metadata."""

    def __init__(self) -> None:
        self.new: list[dict[str, Any]] = []

    def hear(self, event: Event) -> None:
        """A listener of the memory."""
        if isinstance(event, CompactionFinished):
            self.new.append(report_dict(event.report))

    def write(self, session: Session) -> None:
        """Into the session, with the time, for when it is kept; reports of compactions that were undone are dropped."""
        kept = {**session.metadata.get(METADATA_KEY, {}), "updated": time.time()}
        made = {(entry.plan.newest.start, entry.plan.newest.end) for entry in session.snapshot().records}
        reports = [*kept.get("compactions", []), *self.new]
        kept["compactions"] = [report for report in reports if (report["start"], report["end"]) in made]
        self.new = []
        session.metadata[METADATA_KEY] = kept


def report_dict(report: CompactionReport) -> dict[str, Any]:
    """For JSON."""
    told = {name: value for name, value in asdict(report).items() if name != "session"}
    return {**told, "seconds": report.seconds, "created": time.time()}


def kept_compactions(session: Session) -> list[dict[str, Any]]:
    reports: list[dict[str, Any]] = session.metadata.get(METADATA_KEY, {}).get("compactions", [])
    return reports


def last_used(branch: Branch) -> float:
    """When a branch was kept; 0 for one that another program made."""
    return float(branch.session.metadata.get(METADATA_KEY, {}).get("updated", 0.0))
