"""Updates that a chat job publishes to its client, beside the deltas of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from am_memory.conversations.chat import PromptProgress
from am_memory.conversations.chat_answer import ChatAnswer
from am_memory.events import CompactionFinished, CompactionProgress, CompactionStarted, Event, SessionRebuilt, Span
from am_memory.session.session import Session
from am_memory.session.stats import Stats
from am_memory_server.memory_view import memory_view, recalled_pages
from am_memory_server.service import report_dict


@dataclass(frozen=True)
class Started:
    """The request is valid, and the first chunk of the prompt has been read."""


@dataclass(frozen=True)
class MemoryUpdate:
    """An event or a size of the memory, for clients that ask for `include_memory`."""

    data: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The answer is complete, and the conversation is kept."""

    answer: ChatAnswer
    stats: Stats


def event_update(event: Event) -> MemoryUpdate | None:
    """An event of the memory; None for events that clients do not see."""
    match event:
        case CompactionStarted(_, start, end):
            return MemoryUpdate({"event": "compacting", "start": start, "end": end})
        case CompactionProgress(_, stage, done, total):
            return MemoryUpdate({"event": "compaction_progress", "stage": stage, "done": done, "total": total})
        case CompactionFinished(_, report):
            return MemoryUpdate({"event": "compacted", "report": report_dict(report)})
        case SessionRebuilt(_, num_tokens, reason):
            return MemoryUpdate({"event": "rebuilt", "num_tokens": num_tokens, "reason": reason})
    return None


def reading_update(progress: PromptProgress, session: Session) -> MemoryUpdate:
    """How much of the prompt has been read, the size of the memory, and the size at which it compacts."""
    sizes = {"stats": asdict(session.stats), "trigger_tokens": session.trigger_tokens}
    return MemoryUpdate({"event": "reading", **asdict(progress), **sizes})


def size_update(session: Session) -> MemoryUpdate:
    """The size of the memory."""
    return MemoryUpdate({"event": "size", "stats": asdict(session.stats)})


def lookup_update(spans: Sequence[Span], session: Session) -> MemoryUpdate:
    """What was looked up for the answer, all pages that are exact now, and the size of the memory."""
    pages = [page.model_dump() for page in recalled_pages(session)]
    found = [asdict(span) for span in spans]
    return MemoryUpdate({"event": "looked_up", "spans": found, "recalled": pages, "stats": asdict(session.stats)})


def view_update(conversation: str, session: Session) -> MemoryUpdate:
    """Everything about the memory: after a compaction, and at the end of the answer."""
    return MemoryUpdate({"event": "memory", "memory": memory_view(conversation, session, 1).model_dump()})
