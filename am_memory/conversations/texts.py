"""Plain texts as completion clients send them: whole, at every call. Only the tokens that are new are read.

A prompt goes on from the kept text that shares most tokens with it. Texts are kept in memory alone. Knows no messages:
`threads.py` keeps conversations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.conversations.prefix_pool import PrefixPool
from am_memory.conversations.turn import Turn
from am_memory.errors import require_room
from am_memory.memory import Memory
from am_memory.session.appending import encode
from am_memory.session.session import Session

MAX_TEXTS = 32
BLOCK_TOKENS = 65_536
"""Tokens that are compared at once."""
SHORT_TOKENS = 16_384
"""A prompt up to this long is checked in some milliseconds."""


@dataclass(kw_only=True)
class TextTurn(Turn):
    """One call with a plain text. `Texts.keep` keeps it."""

    owner: str


@dataclass(frozen=True)
class KeptText:
    """A prompt with what was generated.

    Attributes:
        tokens: (num_tokens,), int32.
    """

    owner: str
    session: Session
    tokens: Tensor

    @property
    def kv_bytes(self) -> int:
        return self.session.stats.evictable_bytes

    def num_shared(self, tokens: Tensor, owner: str) -> int:
        """How many of its first tokens a prompt of the same owner begins with."""
        return _num_shared(self.tokens, tokens) if self.owner == owner else 0

    def can_rewind(self, num_tokens: int) -> bool:
        """Whether it can go on from its first `num_tokens` tokens without reading anything again."""
        return self.session.can_rewind(num_tokens)

    def is_prefix_of(self, other: KeptText) -> bool:
        """Whether the other one begins with all of this one."""
        return other.num_shared(self.tokens, self.owner) == len(self.tokens)


class Texts:
    """The texts that are kept, on one memory. Beyond the limits the least recently used are evicted.

    Args:
        max_bytes: of all caches together; memory that they share is counted for each.
        max_texts: how many texts are kept.
    """

    def __init__(self, memory: Memory, *, max_bytes: int, max_texts: int = MAX_TEXTS) -> None:
        require_room("texts", max_bytes=max_bytes, max_texts=max_texts)
        self.memory = memory
        self._pool = PrefixPool[KeptText](max_bytes=max_bytes, max_entries=max_texts)
        self._numbers = itertools.count()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt. Needs no device, and may take long.

        Raises:
            InvalidInput: an empty prompt, or token ids outside the vocabulary.
        """
        return encode(self.memory.scratch(), prompt).token_ids

    def start(self, token_ids: list[int], *, owner: str = "") -> TextTurn:
        """Go on from the kept text that shares most tokens with a prompt, or in a new session.

        Args:
            owner: texts of different owners share no cache.
        """
        wanted = _tensor(token_ids[:-1])  # the last token is always read, to predict what follows it
        match = self._pool.longest(lambda kept: kept.num_shared(wanted, owner), KeptText.can_rewind, above=0)
        session, count = self.memory.scratch() if match.entry is None else match.entry.session.fork(), match.num_shared
        session.rewind(count)
        rest = token_ids[count:]
        return TextTurn(
            session=session, num_cached_tokens=count, is_short=len(rest) <= SHORT_TOKENS, owner=owner, _rest=rest
        )

    def keep(self, turn: TextTurn) -> None:
        """Keep a prompt with what was generated, in place of the texts that it begins with."""
        new, name = KeptText(turn.owner, turn.session, _tensor(turn.session.tokens)), f"text {next(self._numbers)}"
        for old_name, kept in self._pool.items():
            if kept.is_prefix_of(new):
                self._pool.remove(old_name)
        self._pool.put(name, new)
        self._pool.evict(name)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all kept caches."""
        return self._pool.kv_bytes


def _tensor(token_ids: Sequence[int]) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int32)


def _num_shared(tokens: Tensor, others: Tensor) -> int:
    """How many of the first tokens are equal."""
    size = min(len(tokens), len(others))
    for start in range(0, size, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, size)
        differs = tokens[start:end] != others[start:end]
        if differs.any():
            return start + int(differs.int().argmax())
    return size
