"""All or nothing: a step that is interrupted anywhere leaves a context as it was, or as it is when the step is done.

A step is done with the last line of its `with` block. Nothing is committed after that, so that there is no line at
which tokens are there and what was said is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from am_memory.compaction.background import BackgroundCompaction
    from am_memory.compaction.record import CompactionRecord
    from am_memory.kv_cache.cache import Snapshot
    from am_memory.queries import LiveQueries
    from am_memory.recall.originals import Original
    from am_memory.recall.paging import Recalled
    from am_memory.session.chat_history import ChatHistory
    from am_memory.session.context import Context


class Restorable(Protocol):
    """Something else that a step changes, and that goes back with it."""

    def state(self) -> Any:
        """What `restore` takes: nothing changes it later."""
        ...

    def restore(self, state: Any) -> None: ...


@dataclass(frozen=True)
class _Before:
    """A context as it was; the two lists are only added to, or replaced, within a step."""

    cache: Snapshot
    tokens: list[int]
    num_tokens: int
    records: list[CompactionRecord]
    num_compactions: int
    history: ChatHistory
    num_pinned: int
    live: LiveQueries | None
    originals: tuple[Original, ...]
    recalled: tuple[Recalled, ...]
    background_compaction: BackgroundCompaction | None
    others: tuple[Any, ...]

    @classmethod
    def of(cls, context: Context, others: tuple[Restorable, ...]) -> _Before:
        return cls(
            cache=context.cache.state(),
            tokens=context.tokens,
            num_tokens=len(context.tokens),
            records=context.records,
            num_compactions=len(context.records),
            history=context.history,
            num_pinned=context.num_pinned,
            live=context.live and context.live.copy(),
            originals=context.originals,
            recalled=context.recalled,
            background_compaction=context.background_compaction,
            others=tuple(other.state() for other in others),
        )

    def put_back(self, context: Context, others: tuple[Restorable, ...]) -> None:
        """Of any state in between, as often as one likes."""
        context.cache.restore(self.cache)
        del self.tokens[self.num_tokens :], self.records[self.num_compactions :]
        context.tokens, context.records, context.history = self.tokens, self.records, self.history
        context.num_pinned = self.num_pinned
        context.live, context.recalled = self.live, self.recalled
        # What was found to be lost is not brought back by an error.
        context.originals = tuple(each for each in self.originals if each.lost is None)
        running = self.background_compaction
        context.background_compaction = None if running is not None and running.has_failed else running
        for other, state in zip(others, self.others, strict=True):
            other.restore(state)


class Transaction:
    """Whatever is raised inside, a context is afterwards as it was before, and so is what goes with it.

    No generator: one that is interrupted on its way in or out is finished when Python frees it, and would put the
    context back long after, over whatever was done since.

    Args:
        others: what else goes back with it.
    """

    def __init__(self, context: Context, others: tuple[Restorable, ...]) -> None:
        self._context, self._others = context, others

    def __enter__(self) -> None:
        self._before = _Before.of(self._context, self._others)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        context, given_up = self._context, self._before.background_compaction
        if error is not None:
            given_up = context.background_compaction
            try:
                self._before.put_back(context, self._others)
            finally:  # again, should it have been interrupted
                self._before.put_back(context, self._others)
        if given_up is not None and given_up is not context.background_compaction:
            given_up.stop()
