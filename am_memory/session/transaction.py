"""All or nothing: a step that is interrupted leaves a context either as it was before, or as it is after the step.

A step is done with the last line of its `with` block; nothing is committed after that line. An interrupt can therefore
never leave the tokens of a message without the message.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from am_memory.compaction.background import BackgroundCompaction
    from am_memory.compaction.record import CompactionRecord
    from am_memory.kv_cache.cache import Snapshot
    from am_memory.kv_cache.checkpoint import Checkpoint
    from am_memory.queries import LiveQueries
    from am_memory.recall.originals import Original
    from am_memory.recall.paging import Recalled
    from am_memory.recall.search_queries import SearchQueries
    from am_memory.session.chat_history import ChatHistory
    from am_memory.session.context import Context
    from am_memory.session.mounts import Mounts


class Restorable(Protocol):
    """Another object that a step changes, and that is restored together with the context."""

    def state(self) -> Any:
        """The state, for `restore`; later changes do not affect it."""
        ...

    def restore(self, state: Any) -> None:
        """Return to a state that `state` gave."""
        ...


@dataclass(frozen=True)
class Before:
    """A context before a step. Within a step its two lists are only extended, or replaced by others.

    It stands in `Context.before_step` while the step runs, for other threads that look at the context.
    """

    cache: Snapshot
    tokens: list[int]
    num_tokens: int
    records: list[CompactionRecord]
    num_compactions: int
    history: ChatHistory
    num_pinned: int
    live: LiveQueries | None
    recent_queries: SearchQueries | None
    checkpoints: tuple[Checkpoint, ...]
    originals: tuple[Original, ...]
    recalled: tuple[Recalled, ...]
    mounts: Mounts
    background_compaction: BackgroundCompaction | None
    others: tuple[Any, ...]

    @classmethod
    def of(cls, context: Context, others: tuple[Restorable, ...]) -> Before:
        """Remember how the context and the other objects are now."""
        return cls(
            cache=context.cache.state(),
            tokens=context.tokens,
            num_tokens=len(context.tokens),
            records=context.records,
            num_compactions=len(context.records),
            history=context.history,
            num_pinned=context.num_pinned,
            live=context.live and context.live.copy(),
            recent_queries=context.recent_queries,
            checkpoints=context.checkpoints,
            originals=context.originals,
            recalled=context.recalled,
            mounts=context.mounts,
            background_compaction=context.background_compaction,
            others=tuple(other.state() for other in others),
        )

    def put_back(self, context: Context, others: tuple[Restorable, ...]) -> None:
        """Restore all of it, from any state in between; doing it twice changes nothing."""
        context.cache.restore(self.cache)
        del self.tokens[self.num_tokens :], self.records[self.num_compactions :]
        context.tokens, context.records, context.history = self.tokens, self.records, self.history
        context.num_pinned, context.awaited_text = self.num_pinned, None
        context.live, context.recent_queries = self.live, self.recent_queries
        context.recalled, context.mounts, context.checkpoints = self.recalled, self.mounts, self.checkpoints
        # An original that turned out to be lost stays lost.
        context.originals = tuple(original for original in self.originals if original.lost is None)
        running = self.background_compaction
        context.background_compaction = None if running is not None and running.has_failed else running
        for other, state in zip(others, self.others, strict=True):
            other.restore(state)


class Transaction:
    """A `with` block that restores a context, and some other objects, if anything is raised inside.

    It is a class and not a generator. Python finishes an interrupted generator only when it frees it, which would
    restore the context long afterwards, over all later changes.

    Args:
        context: the context that is restored.
        others: objects that are restored together with it.
    """

    def __init__(self, context: Context, others: tuple[Restorable, ...]) -> None:
        self._context, self._others = context, others

    def __enter__(self) -> Before:
        self._before = Before.of(self._context, self._others)
        self._outer = self._context.before_step
        self._context.before_step = self._outer or self._before
        return self._before

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context, abandoned = self._context, self._before.background_compaction
        try:
            if error is not None:
                abandoned = context.background_compaction
                try:
                    self._before.put_back(context, self._others)
                finally:  # once more, in case an interrupt stopped the first time
                    self._before.put_back(context, self._others)
        finally:
            context.before_step, context.num_steps = self._outer, context.num_steps + 1
        if abandoned is not None and abandoned is not context.background_compaction:
            abandoned.stop()
