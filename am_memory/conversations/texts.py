"""Plain texts as completion clients send them: whole, at every call. Only the tokens that are new are read.

What was read is found by the longest common beginning, in tokens. Kept in memory alone, the least recently used go
first. Knows no messages: conversations are the work of `am_memory.conversations.threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from am_memory.errors import require_room
from am_memory.memory import Memory
from am_memory.session.session import Encoded, Session

MAX_TEXTS = 32
BLOCK_TOKENS = 65_536
"""That are compared at once."""
SHORT_TOKENS = 16_384


@dataclass
class TextTurn:
    """One call: a session that is told the prompt; `Texts.keep` keeps it.

    Attributes:
        num_cached_tokens: of the prompt, how many are not read in this call.
    """

    session: Session
    num_cached_tokens: int
    owner: str
    _news: list[int] = field(repr=False)
    _encoded: Encoded | None = field(default=None, repr=False)

    @property
    def is_short(self) -> bool:
        """Whether `encode` takes no longer than a step on the device."""
        return len(self._news) <= SHORT_TOKENS

    def encode(self) -> None:
        """Look at what the session has still to be told. Needs no device."""
        self._encoded = self.session.encode(self._news)

    def tell(self) -> None:
        """Tell the session what was encoded."""
        assert self._encoded is not None, "encode() comes first"
        self.session.tell(self._encoded)


@dataclass(frozen=True)
class _Kept:
    owner: str
    session: Session
    tokens: Tensor  # (num_tokens,) int32


class Texts:
    """What is kept of plain texts, on one memory.

    Args:
        max_bytes: of all kept caches together, shared memory counted for each.
        max_texts: kept.
    """

    def __init__(self, memory: Memory, *, max_bytes: int, max_texts: int = MAX_TEXTS) -> None:
        require_room("texts", max_bytes=max_bytes, max_texts=max_texts)
        self.memory, self.max_bytes, self.max_texts = memory, max_bytes, max_texts
        self._kept: tuple[_Kept, ...] = ()  # least recently used first

    def begin(self, prompt: str | Sequence[int], *, owner: str = "") -> TextTurn:
        """Find what is known of a prompt; the session has been told all of it, and reads the rest when asked.

        Args:
            prompt: a text, or token ids.
            owner: whose it is: nothing that was read for another owner is used.

        Raises:
            InvalidInput: an empty prompt, or token ids that the model does not have.
        """
        turn = self.start(self.encode(prompt), owner=owner)
        turn.encode()
        turn.tell()
        return turn

    # The same in parts: those that need no device may be done by another thread while sessions go on

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt. Needs no device, and may take long.

        Raises:
            InvalidInput: an empty prompt, or token ids that the model does not have.
        """
        return self.memory.scratch().encode(prompt).token_ids

    def start(self, token_ids: list[int], *, owner: str = "") -> TextTurn:
        """Go on from the kept text that begins most like this one; the turn is still to be told the rest."""
        wanted = _tensor(token_ids)
        best, count = None, 0
        for kept in self._kept:
            if kept.owner == owner:
                # The last token is always read, to see what follows it.
                shared = min(_num_shared(kept.tokens, wanted), len(wanted) - 1)
                if shared > count and kept.session.can_rewind(shared):
                    best, count = kept, shared
        if best is None:
            return TextTurn(self.memory.scratch(), 0, owner, token_ids)
        self._kept = (*(kept for kept in self._kept if kept is not best), best)
        branch = best.session.fork()
        branch.rewind(count)
        return TextTurn(branch, count, owner, token_ids[count:])

    def keep(self, turn: TextTurn) -> None:
        """Keep a prompt with what was generated; what it goes on from is part of it."""
        new = _Kept(turn.owner, turn.session, _tensor(turn.session.tokens))
        others = [
            kept
            for kept in self._kept
            if kept.owner != new.owner or _num_shared(kept.tokens, new.tokens) < len(kept.tokens)
        ]
        sizes = [kept.session.stats.kv_bytes for kept in (*others, new)]
        first = 0
        while first < len(others) and (len(sizes) - first > self.max_texts or sum(sizes[first:]) > self.max_bytes):
            first += 1
        self._kept = (*others[first:], new)

    @property
    def kv_bytes(self) -> int:
        """Of all kept caches."""
        return sum(kept.session.stats.kv_bytes for kept in self._kept)


def _tensor(token_ids: Sequence[int]) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int32)


def _num_shared(tokens: Tensor, others: Tensor) -> int:
    """How many of the first tokens are the same."""
    size = min(len(tokens), len(others))
    for start in range(0, size, BLOCK_TOKENS):
        end = min(start + BLOCK_TOKENS, size)
        differs = tokens[start:end] != others[start:end]
        if differs.any():
            return start + int(differs.int().argmax())
    return size
