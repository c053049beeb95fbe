"""Responses that `previous_response_id` may name: the messages up to each, of one key. Knows no HTTP and no model."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock
from typing import Any

MAX_KEPT_BYTES = 256 * 2**20
"""Text of all kept responses together, and of their inputs."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """The messages that came with one response, and its answer. The responses that follow it share it."""

    messages: Sequence[Mapping[str, Any]]
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", _num_bytes(self.messages))


@dataclass(frozen=True)
class KeptResponse:
    """One response.

    Attributes:
        conversation: the name of its conversation.
        exchanges: all messages up to its answer, without instructions.
        response: as its client got it.
    """

    conversation: str
    exchanges: Sequence[Exchange]
    response: Mapping[str, Any]
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bytes", _num_bytes([self.response]))

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """The messages of all exchanges."""
        return [*chain.from_iterable(exchange.messages for exchange in self.exchanges)]


def _num_bytes(items: Sequence[Mapping[str, Any]]) -> int:
    return sum(len(json.dumps(item)) for item in items)


class KeptResponses:
    """The responses of all keys, the most recently used last. Beyond a bound the least recently used are forgotten.

    Args:
        max_responses: of one key.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[tuple[str, str], KeptResponse] = OrderedDict()
        self._num_uses = Counter[Exchange]()
        self._num_bytes = 0
        self._lock = Lock()

    def get(self, owner: str, id: str) -> KeptResponse | None:
        """A response of this owner, if it is kept."""
        with self._lock:
            if (owner, id) in self._kept:
                self._kept.move_to_end((owner, id))
            return self._kept.get((owner, id))

    def keep(self, owner: str, kept: KeptResponse) -> None:
        """Keep a response under the id that it has."""
        with self._lock:
            self._kept[owner, kept.response["id"]] = kept
            self._num_bytes += kept.num_bytes
            for exchange in kept.exchanges:
                self._num_bytes += 0 if exchange in self._num_uses else exchange.num_bytes
                self._num_uses[exchange] += 1
            own = [key for key in self._kept if key[0] == owner]
            for key in own[: len(own) - self._max_responses]:
                self._forget(key)
            while self._num_bytes > self._max_bytes and len(self._kept) > 1:
                self._forget(next(iter(self._kept)))

    def delete(self, owner: str, id: str) -> bool:
        """Forget a response. Returns whether there was one."""
        with self._lock:
            return self._forget((owner, id))

    def delete_conversation(self, owner: str, conversation: str) -> None:
        """Forget all responses of a conversation."""
        with self._lock:
            for key, kept in list(self._kept.items()):
                if key[0] == owner and kept.conversation == conversation:
                    self._forget(key)

    def _forget(self, key: tuple[str, str]) -> bool:
        if (kept := self._kept.pop(key, None)) is None:
            return False
        self._num_bytes -= kept.num_bytes
        for exchange in kept.exchanges:
            self._num_uses[exchange] -= 1
            if not self._num_uses[exchange]:  # no later response needs it
                del self._num_uses[exchange]
                self._num_bytes -= exchange.num_bytes
        return True
