"""Responses that `previous_response_id` may name: the messages up to each, of one key. Knows no HTTP and no model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

MAX_KEPT_BYTES = 256 * 2**20
"""Text of all kept responses together, and of their inputs."""


@dataclass(frozen=True)
class KeptResponse:
    """One response.

    Attributes:
        conversation: the name of its conversation.
        messages: all messages up to its answer, without instructions.
        response: as its client got it.
        num_new: how many of the messages came with this response; the others belong to the ones before it.
    """

    conversation: str
    messages: Sequence[Mapping[str, Any]]
    response: Mapping[str, Any]
    num_new: int
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        new = [*self.messages[len(self.messages) - self.num_new :], self.response]
        object.__setattr__(self, "num_bytes", sum(len(json.dumps(item)) for item in new))


class KeptResponses:
    """The responses of all keys, the most recently used last. Beyond a bound the least recently used are forgotten.

    Args:
        max_responses: of one key.
    """

    def __init__(self, max_responses: int, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[tuple[str, str], KeptResponse] = OrderedDict()
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
        kept = self._kept.pop(key, None)
        self._num_bytes -= 0 if kept is None else kept.num_bytes
        return kept is not None
