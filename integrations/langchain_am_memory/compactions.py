"""Compactions and lookups as LangChain events: for `on_custom_event` of callback handlers, and for streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.runnables.config import ensure_config, get_callback_manager_for_config

from am_memory.conversations.chat_answer import as_shown
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionStarted,
    Event,
    Listener,
    MemoryConsulted,
)

EVENT, LOOKUP = "am_memory.compaction", "am_memory.lookup"

Emit = Callable[[dict[str, Any]], object]

_HANDLER = ("on_custom_event", "ignore_custom_event")


def as_dict(event: Event) -> dict[str, Any] | None:
    """An event with its "type"; None for kinds of events that LangChain does not get.

    {"type": EVENT, "event": "started" | "progress" | "finished", ...}, or {"type": LOOKUP, "spans": [...], ...}.
    """
    match event:
        case CompactionStarted():
            return {"type": EVENT, "event": "started", **asdict(event)}
        case CompactionProgress():
            return {"type": EVENT, "event": "progress", **asdict(event)}
        case CompactionFinished():
            return {"type": EVENT, "event": "finished", **asdict(event.report)}
        case MemoryConsulted(_, _, spans):
            return {"type": LOOKUP, **asdict(event), "spans": [asdict(as_shown(span)) for span in spans]}
    return None


def listener(thread: str, emit: Emit) -> Listener:
    """A listener of the memory that emits the compactions and lookups of one thread."""

    def listen(event: Event) -> None:
        if getattr(event, "session", None) == thread and (data := as_dict(event)) is not None:
            emit(data)

    return listen


@dataclass(frozen=True)
class CallbackRun:
    """The callback handlers of one call.

    LangChain passes no run to a model that streams. Then the run is the one around the call, if there is one.
    """

    handlers: list[BaseCallbackHandler]
    context: dict[str, Any]

    @classmethod
    def of(cls, run: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None) -> CallbackRun:
        if run is not None:
            return cls(run.handlers, {"run_id": run.run_id, "tags": run.tags, "metadata": run.metadata})
        outer = get_callback_manager_for_config(ensure_config())
        context = {"run_id": outer.parent_run_id, "tags": outer.tags, "metadata": outer.metadata}
        return cls(outer.handlers if outer.parent_run_id is not None else [], context)

    def emit(self, data: dict[str, Any]) -> None:
        """Call the handlers."""
        handle_event(self.handlers, *_HANDLER, data["type"], data, **self.context)


class LoopEmitter:
    """Calls the handlers of a run in an event loop, from another thread."""

    def __init__(self, run: CallbackRun, loop: asyncio.AbstractEventLoop) -> None:
        self._run, self._loop = run, loop
        self._pending: list[Future[None]] = []

    def emit(self, data: dict[str, Any]) -> None:
        handled = ahandle_event(self._run.handlers, *_HANDLER, data["type"], data, **self._run.context)
        self._pending.append(asyncio.run_coroutine_threadsafe(handled, self._loop))

    async def flush(self) -> None:
        """Wait for the handlers of all events so far."""
        pending, self._pending = self._pending, []
        await asyncio.gather(*map(asyncio.wrap_future, pending))
