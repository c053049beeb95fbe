"""The compactions of a context as they are kept, so that they can be made again. Knows not how they are made.

All that a compaction depends on beside the tokens and what was compacted before is here, and so is what stood in the
cache while the tokens behind it were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

from am_memory.compaction.plan import Plan
from am_memory.errors import InvalidPolicy
from am_memory.policy import MemoryPolicy


class Summary(NamedTuple):
    """Token ids of the prompt for a summary, and of what the model answered; it may be nothing."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class RecallRecord(NamedTuple):
    """A segment that became exact, or compact again, when the cache held `at_tokens` logical tokens.

    Attributes:
        start: where the segment begins.
        is_exact: it became exact, or, if it was, the one recalled last.
    """

    at_tokens: int
    start: int
    is_exact: bool


def as_policy(written: object) -> MemoryPolicy | None:
    """A policy as it was written; None where it needs a key selection that no file can hold."""
    try:
        return MemoryPolicy(**written) if isinstance(written, Mapping) else None
    except InvalidPolicy:
        return None


def _read(policy: object) -> MemoryPolicy | None:
    return policy if isinstance(policy, MemoryPolicy) else as_policy(policy)


@dataclass(frozen=True)
class CompactionRecord:
    """A compaction that was made when the cache held `at_tokens` logical tokens.

    Attributes:
        conversations: of self-study, token ids of each prompt with the model's answer. Where the compaction is made
            again they are read, not written anew: rounding alone may make a model write something else.
        summary: in the place of the block, where the policy wanted one; read again as well.
        lag_tokens: how many more the cache held when it was swapped in.
        live_start: the first token whose live queries were there, where the policy wanted them.
        recalls: what was recalled and put away between this compaction and the next.
        policy: that it was made under; None: the context's own, or one with a key selection that no file can hold.
    """

    at_tokens: int
    plan: Plan
    conversations: tuple[tuple[int, ...], ...] = ()
    summary: Summary | None = None
    lag_tokens: int = 0
    live_start: int = 0
    recalls: tuple[RecallRecord, ...] = ()
    policy: Annotated[MemoryPolicy | None, BeforeValidator(_read)] = None

    @property
    def swapped_at(self) -> int:
        """Logical tokens in the cache when it was swapped in."""
        return self.at_tokens + self.lag_tokens

    def within(self, num_tokens: int) -> CompactionRecord:
        """The same, swapped in, and with its segments recalled, when the cache held `num_tokens` at most.

        Args:
            num_tokens: at least `at_tokens`: what a compaction saw is what it depends on.
        """
        assert self.at_tokens <= num_tokens
        return replace(
            self,
            lag_tokens=min(self.swapped_at, num_tokens) - self.at_tokens,
            recalls=tuple(each._replace(at_tokens=min(each.at_tokens, num_tokens)) for each in self.recalls),
        )


def under(policy: MemoryPolicy | None, records: Iterable[CompactionRecord]) -> list[CompactionRecord]:
    """The records of a context of this policy, for one that goes on under another; None: it is not known."""
    return [replace(made, policy=made.policy or policy) for made in records]
