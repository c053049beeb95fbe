"""Compactions as LangChain events: what a callback handler's `on_custom_event`, or a stream of events, gets to see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, BaseCallbackHandler, CallbackManagerForLLMRun
from langchain_core.callbacks.manager import ahandle_event, handle_event
from langchain_core.runnables.config import ensure_config, get_callback_manager_for_config

from am_memory.events import CompactionFinished, CompactionProgress, CompactionStarted, Event, Listener

EVENT = "am_memory.compaction"

_HANDLER = ("on_custom_event", "ignore_custom_event")


def as_dict(event: Event) -> dict[str, Any] | None:
    """{"type": EVENT, "event": "started" | "progress" | "finished", ...}; None for events of other kinds."""
    match event:
        case CompactionStarted():
            return {"type": EVENT, "event": "started", **asdict(event)}
        case CompactionProgress():
            return {"type": EVENT, "event": "progress", **asdict(event)}
        case CompactionFinished():
            return {"type": EVENT, "event": "finished", **asdict(event.report)}
    return None


def listener(thread: str, tell: Callable[[dict[str, Any]], object]) -> Listener:
    """Tells of the compactions of one thread."""

    def listen(event: Event) -> None:
        if getattr(event, "session", None) == thread and (said := as_dict(event)) is not None:
            tell(said)

    return listen


@dataclass(frozen=True)
class Run:
    """Whom to tell of what happens in a call: the callback handlers of its run.

    LangChain does not hand a model its run while it streams; then it is the run that the model is called in, if any.
    """

    handlers: list[BaseCallbackHandler]
    about: dict[str, Any]

    @classmethod
    def of_call(cls, run: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun | None) -> Run:
        if run is not None:
            return cls(run.handlers, {"run_id": run.run_id, "tags": run.tags, "metadata": run.metadata})
        outer = get_callback_manager_for_config(ensure_config())
        is_run = outer.parent_run_id is not None
        about = {"run_id": outer.parent_run_id, "tags": outer.tags, "metadata": outer.metadata}
        return cls(outer.handlers if is_run else [], about)

    def tell(self, said: dict[str, Any]) -> None:
        handle_event(self.handlers, *_HANDLER, EVENT, said, **self.about)


class ToldLater:
    """Tells a run from another thread than the event loop's, in which its handlers are called."""

    def __init__(self, run: Run, loop: asyncio.AbstractEventLoop) -> None:
        self._run = run
        self._loop = loop
        self._told: list[Future[None]] = []

    def __call__(self, said: dict[str, Any]) -> None:
        telling = ahandle_event(self._run.handlers, *_HANDLER, EVENT, said, **self._run.about)
        self._told.append(asyncio.run_coroutine_threadsafe(telling, self._loop))

    async def settle(self) -> None:
        """Wait until everything is told."""
        told, self._told = self._told, []
        await asyncio.gather(*map(asyncio.wrap_future, told))
