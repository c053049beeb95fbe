"""Plain texts as completion clients send them: whole, at every call. Only the tokens that are new are read.

What was read is found by the longest common beginning, in tokens. Kept in memory alone, the least recently used go
first. Knows no messages: conversations are the work of `am_memory.threads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from am_memory.errors import require_room
from am_memory.memory import Memory
from am_memory.session import Session

MAX_TEXTS = 32


@dataclass(frozen=True)
class TextTurn:
    """One call: a session that has been told the prompt; `Texts.keep` keeps it.

    Attributes:
        num_cached_tokens: of the prompt, how many are not read in this call.
    """

    session: Session
    num_cached_tokens: int
    owner: str


class Texts:
    """What is kept of plain texts, on one memory.

    Args:
        max_bytes: of all kept caches together, shared memory counted for each.
        max_texts: kept.
    """

    def __init__(self, memory: Memory, *, max_bytes: int, max_texts: int = MAX_TEXTS) -> None:
        require_room("texts", max_bytes=max_bytes, max_texts=max_texts)
        self.memory, self.max_bytes, self.max_texts = memory, max_bytes, max_texts
        self._kept: list[tuple[str, Session]] = []  # least recently used first

    def begin(self, prompt: str | Sequence[int], *, owner: str = "") -> TextTurn:
        """Find what is known of a prompt; the session has been told all of it, and reads the rest when asked.

        Args:
            prompt: a text, or token ids.
            owner: whose it is: nothing that was read for another owner is used.

        Raises:
            InvalidInput: an empty prompt, or token ids that the model does not have.
        """
        scratch = self.memory.scratch()
        scratch.tell(prompt)
        wanted = scratch.tokens
        best, count = None, 0
        for number, (other, session) in enumerate(self._kept):
            # The last token is always read, to see what follows it.
            shared = min(_num_shared(session.tokens, wanted), len(wanted) - 1)
            if other == owner and shared > count and session.can_rewind(shared):
                best, count = number, shared
        if best is None:
            return TextTurn(scratch, 0, owner)
        self._kept.append(self._kept.pop(best))
        branch = self._kept[-1][1].fork()
        branch.rewind(count)
        branch.tell(wanted[count:])
        return TextTurn(branch, count, owner)

    def keep(self, turn: TextTurn) -> None:
        """Keep a prompt with what was generated; what it goes on from is part of it."""
        tokens = turn.session.tokens
        self._kept = [
            (owner, session)
            for owner, session in self._kept
            if owner != turn.owner or _num_shared(session.tokens, tokens) < len(session.tokens)
        ]
        self._kept.append((turn.owner, turn.session))
        while len(self._kept) > 1 and (len(self._kept) > self.max_texts or self.kv_bytes > self.max_bytes):
            del self._kept[0]

    @property
    def kv_bytes(self) -> int:
        """Of all kept caches."""
        return sum(session.stats.kv_bytes for _, session in self._kept)


def _num_shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    pairs = zip(tokens, others, strict=False)
    return next((i for i, (mine, other) in enumerate(pairs) if mine != other), min(len(tokens), len(others)))
