"""Fairness: a queue that takes turns between owners, and a limit of which each owner has a share. Starts no thread."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue that takes turns between the first names of its keys, then between the second ones, and so on.

    A name that comes new is next after the names that wait already, and before the name that had the last turn.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._branches: OrderedDict[str, FairQueue[T]] = OrderedDict()
        self._last = ""

    def push(self, key: tuple[str, ...], item: T) -> None:
        """Append an item."""
        if not key:
            self._items.append(item)
            return
        if key[0] not in self._branches:
            self._branches[key[0]] = FairQueue()
            if self._last in self._branches:
                self._branches.move_to_end(self._last)
        self._branches[key[0]].push(key[1:], item)

    def pop(self, name: str | None = None) -> T:
        """The next item; of the keys that begin with `name`, if it is given."""
        if self._items:
            return self._items.popleft()
        self._last = next(iter(self._branches)) if name is None else name
        branch = self._branches.pop(self._last)
        item = branch.pop()
        if len(branch):
            self._branches[self._last] = branch
        return item

    def discard(self, key: tuple[str, ...], item: T) -> bool:
        """Remove an item, and say whether it was in the queue."""
        if not key:
            if is_there := item in self._items:
                self._items.remove(item)
            return is_there
        branch = self._branches.get(key[0])
        if branch is None or not branch.discard(key[1:], item):
            return False
        if not len(branch):
            del self._branches[key[0]]
        return True

    @property
    def names(self) -> list[str]:
        """The first names of all keys, in the order of their turns."""
        return list(self._branches)

    def count(self, name: str) -> int:
        """Number of items whose keys begin with this name."""
        return len(self._branches.get(name, ()))

    def __len__(self) -> int:
        return len(self._items) + sum(map(len, self._branches.values()))


class FairLimit(Generic[T]):
    """Waiting items, and how many items of each owner are active.

    An owner gets one more active item if fewer than `max_active` are active, or if the owner has less than a fair share
    of them. So no owner can hold them all, and every owner has at least one.

    Args:
        max_active: for all owners together; their shares may exceed it.
    """

    def __init__(self, max_active: int) -> None:
        self.max_active = max_active
        self.waiting: FairQueue[T] = FairQueue()
        self.active: Counter[str] = Counter()

    def admit(self) -> Iterator[T]:
        """Make waiting items active, as many as the limit allows."""
        while (owner := self._next_owner()) is not None:
            self.active[owner] += 1
            yield self.waiting.pop(owner)

    def _next_owner(self) -> str | None:
        waiting = self.waiting.names
        share = max(self.max_active // len({*waiting, *self.active} or {""}), 1)
        has_room = self.active.total() < self.max_active
        return next((owner for owner in waiting if has_room or self.active[owner] < share), None)

    def release(self, owner: str) -> None:
        """An item of this owner is no longer active."""
        self.active[owner] -= 1
        self.active += Counter()  # drops owners without any
