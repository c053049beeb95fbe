"""Whose turn it is: between the first names of keys, then between the second ones, and so on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, count
from typing import TypeVar

T = TypeVar("T")
Key = tuple[object, ...]


class Turns:
    """Gives turns to those who ask for one. A name that is new is the next.

    No name waits for longer than all others take one turn each, however many items the others have.
    """

    def __init__(self) -> None:
        self._last: dict[Key, int] = {}
        self._numbers = count(1)

    def next(self, items: Sequence[T], keys: Iterable[Key]) -> T:
        """The item whose turn it is.

        Args:
            items: at least one.
            keys: one for each item.
        """
        prefixes = {id(item): _prefixes((*key, id(item))) for item, key in zip(items, keys, strict=True)}
        known = {prefix for each in prefixes.values() for prefix in each}
        self._last = {prefix: number for prefix, number in self._last.items() if prefix in known}
        chosen = min(items, key=lambda item: [self._last.get(prefix, 0) for prefix in prefixes[id(item)]])
        number = next(self._numbers)
        self._last.update(dict.fromkeys(prefixes[id(chosen)], number))
        return chosen


def _prefixes(key: Key) -> list[Key]:
    return list(accumulate(((name,) for name in key), initial=()))[1:]
