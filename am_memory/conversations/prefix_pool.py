"""Caches of prompts that were read: a new prompt goes on from the one that shares most with it.

Bounded in bytes and in number. Superseded caches are evicted first, then the least recently used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar


class CachedPrefix(Protocol):
    """A prompt with its cache."""

    @property
    def kv_bytes(self) -> int:
        """Memory that its eviction frees."""
        ...

    def is_prefix_of(self, other: Any, /) -> bool: ...


T = TypeVar("T", bound=CachedPrefix)


@dataclass(frozen=True)
class Match(Generic[T]):
    """The result of a search for the beginning of a prompt.

    Attributes:
        entry: the cache to go on from; None where there is none.
        num_shared: how much of the prompt it has; 0 without one.
        most_shared: how much of the prompt any cache has, those included that cannot go back to that place.
    """

    entry: T | None
    num_shared: int
    most_shared: int


class PrefixPool(Generic[T]):
    """Named caches, in the order of their last use. Threads may share it.

    Args:
        max_bytes: of all caches together; memory that they share is counted for each.
        max_entries: how many there may be.
    """

    def __init__(self, *, max_bytes: int, max_entries: int) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: dict[str, T] = {}  # least recently used first
        self._lock = RLock()

    def items(self) -> list[tuple[str, T]]:
        """Names and caches, the least recently used first."""
        with self._lock:
            return list(self._entries.items())

    @property
    def entries(self) -> list[T]:
        """The caches, the least recently used first."""
        return [entry for _, entry in self.items()]

    @property
    def kv_bytes(self) -> int:
        return sum(entry.kv_bytes for entry in self.entries)

    def get(self, name: str) -> T | None:
        with self._lock:
            return self._entries.get(name)

    def put(self, name: str, entry: T) -> None:
        """Add a cache as the most recently used, in place of the one of the same name."""
        with self._lock:
            self._entries.pop(name, None)
            self._entries[name] = entry

    def remove(self, name: str) -> None:
        with self._lock:
            self._entries.pop(name, None)

    def longest(self, num_shared: Callable[[T], int], can_rewind: Callable[[T, int], bool], *, above: int) -> Match[T]:
        """Find the cache that shares most with a prompt, and mark it as used.

        Args:
            num_shared: how much of the prompt a cache has.
            can_rewind: whether a cache can go back to so much without reading anything again.
            above: a cache that shares no more than this is not worth going on from.
        """
        with self._lock:
            best, best_count, most = None, above, above
            for name, entry in self._entries.items():
                count = num_shared(entry)
                most = max(most, count)
                if count > best_count and can_rewind(entry, count):
                    best, best_count = name, count
            if best is None:
                return Match(None, 0, most)
            entry = self._entries.pop(best)
            self._entries[best] = entry
            return Match(entry, best_count, most)

    def evict(self, newest: str) -> list[str]:
        """Drop caches until the others fit; `newest` stays in any case. Returns the names of those dropped."""
        with self._lock:
            sizes = {name: entry.kv_bytes for name, entry in self._entries.items()}
            others = [name for name in sizes if name != newest]
            total, evicted = sum(sizes.values()), list[str]()
            while others and (total > self.max_bytes or len(self._entries) > self.max_entries):
                name = next(filter(self._is_superseded, others), others[0])
                others.remove(name)
                total -= sizes[name]
                del self._entries[name]
                evicted.append(name)
            return evicted

    def _is_superseded(self, name: str) -> bool:
        """Whether a longer cache has gone on from this one."""
        entry = self._entries[name]
        return any(entry.is_prefix_of(other) for other in self._entries.values() if other is not entry)
