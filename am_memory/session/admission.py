"""Who takes part in the steps of a batch: those that fit into the memory of the device. Knows no queue and no model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

from am_memory.session.context import Context
from am_memory.session.stepwise import Stepwise

Work = Stepwise[Any]


class Admission:
    """Chooses the work that goes on, in the order in which its sessions came.

    A session that runs out of memory is parked until there are fewer. Sessions that come later wait behind it. So it
    waits for no longer than the work of those that were there before.

    Args:
        max_bytes: of the caches of all work that goes on; the first one goes on in any case. None: no limit. A cache
            counts with the bytes that it may reach: those at its trigger, or fewer if the work ends before.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._numbers, self._num_early, self._can_park = count(), 0, False
        self._arrivals: WeakKeyDictionary[Context, int] = WeakKeyDictionary()
        self._parked: WeakKeyDictionary[Context, tuple[int, int]] = WeakKeyDictionary()
        """The last arrival before it was parked, and how many there were then."""

    def able(self, going: Sequence[Work]) -> list[Work]:
        """The work that goes on now: at least one, if there is any."""
        for work in going:
            if work.context not in self._arrivals:
                self._arrivals[work.context] = next(self._numbers)
        parked = [self._parked[work.context] for work in going if work.context in self._parked]
        last = min((arrival for arrival, _ in parked), default=None)
        early = [work for work in going if last is None or self._arrivals[work.context] <= last]
        self._num_early = len(early)
        able = self._within_bytes([work for work in early if self._fits(work.context)])
        self._can_park = bool(able) and len(going) > 1
        return able or list(going[:1])

    def _fits(self, context: Context) -> bool:
        return context not in self._parked or self._num_early < self._parked[context][1]

    def _within_bytes(self, works: Sequence[Work]) -> list[Work]:
        """The first ones of these, in the order in which they came, whose caches fit; in the order of `works`."""
        if self._max_bytes is None:
            return list(works)
        token_bytes = max((_token_bytes(work.context) for work in works), default=0.0)
        fitting, num_bytes = set[Context](), 0.0
        for work in sorted(works, key=lambda work: self._arrivals[work.context]):
            num_bytes += _most_bytes(work, token_bytes)
            if fitting and num_bytes > self._max_bytes:
                break
            fitting.add(work.context)
        return [work for work in works if work.context in fitting]

    def park(self, work: Work) -> bool:
        """Let a session wait until there are fewer; False if it must not wait, because nobody else goes on."""
        if self._can_park:
            self._parked[work.context] = max(self._arrivals.values()), self._num_early
        return self._can_park

    def unpark(self, work: Work) -> None:
        """The session fits again: those that came later need not wait for it any more."""
        self._parked.pop(work.context, None)


def _token_bytes(context: Context) -> float:
    """Bytes of an exact token; 0 while nothing has been read."""
    return context.cache.exact_nbytes / max(context.cache.num_tokens, 1)


def _most_bytes(work: Work, token_bytes: float) -> float:
    """Bytes that a cache may reach: no more than at its trigger, because it is compacted there."""
    context = work.context
    num_new = context.num_readable - context.cache.num_tokens + 1 + work.most_new_tokens
    return max(min(context.kv_tokens + num_new, context.trigger_tokens) * token_bytes, context.cache.nbytes)
