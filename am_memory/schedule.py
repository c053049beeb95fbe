"""The compactions of a context as they are kept, so that they can be made again. Knows not how they are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from am_memory.policy import Plan


class Summary(NamedTuple):
    """Token ids of the prompt for a summary, and of what the model answered; it may be nothing."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class ScheduledCompaction:
    """A compaction that was made when the cache held `at_tokens` logical tokens.

    Attributes:
        conversations: of self-study, token ids of each prompt with the model's answer. Where the compaction is made
            again they are read, not written anew: rounding alone may make a model write something else.
        summary: in the place of the block, where the policy wanted one; read again as well.
        lag_tokens: how many more the cache held when it was swapped in.
    """

    at_tokens: int
    plan: Plan
    conversations: tuple[tuple[int, ...], ...] = ()
    summary: Summary | None = None
    lag_tokens: int = 0

    @property
    def swapped_at(self) -> int:
        """Logical tokens in the cache when it was swapped in."""
        return self.at_tokens + self.lag_tokens

    def within(self, num_tokens: int) -> ScheduledCompaction:
        """The same, made and swapped in when the cache held `num_tokens` at most."""
        at_tokens = min(self.at_tokens, num_tokens)
        return replace(self, at_tokens=at_tokens, lag_tokens=min(self.swapped_at, num_tokens) - at_tokens)
