"""Records of a context's compactions, kept so that they can be made again.

A record holds all that a compaction depends on besides the tokens and the compactions before it, and which entries
were in the cache while later tokens were read. It does not know how a compaction runs.
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
    """Token ids of the prompt for a summary, and of the model's answer, which may be empty."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class RecallRecord(NamedTuple):
    """The page [start, end) was recalled, or compacted again, when the cache held `at_tokens` logical tokens.

    Attributes:
        is_exact: True if it was recalled; a page that was exact already became the most recently recalled one.
    """

    at_tokens: int
    start: int
    end: int
    is_exact: bool


class MountRecord(NamedTuple):
    """A text was mounted or unmounted, or a page of it recalled or compacted again.

    Attributes:
        at_tokens: logical tokens that the cache held.
        num_compactions: compactions that were swapped in before.
        start, end: the negative positions that name the text's tokens, or the page's.
        is_of_text: it is about the text, and not about a page of it.
        is_there: it was mounted, or recalled; if it was that already, the text ends at `seen_from` from now on, and the
            page counts as recalled last.
        seen_from: tokens that a mounted text ends behind, and that do not see it: at least the attention sinks.
    """

    at_tokens: int
    num_compactions: int
    start: int
    end: int
    is_of_text: bool
    is_there: bool
    seen_from: int = 0


def as_policy(written: object) -> MemoryPolicy | None:
    """A policy from its JSON; None if it uses a key selection that is not built in."""
    try:
        return MemoryPolicy(**written) if isinstance(written, Mapping) else None
    except InvalidPolicy:
        return None


def _policy_from(policy: object) -> MemoryPolicy | None:
    return policy if isinstance(policy, MemoryPolicy) else as_policy(policy)


@dataclass(frozen=True)
class RefinementRecord:
    """The segment [start, end) got new slots when the cache held `at_tokens` logical tokens.

    Attributes:
        num_slots: of the segment at that time, over all layers and KV heads.
        conversations: self-study's prompts and answers, as in `CompactionRecord`.
        policy: the one that the refinement followed; None as in `CompactionRecord`.
    """

    at_tokens: int
    start: int
    end: int
    num_slots: int
    conversations: tuple[tuple[int, ...], ...] = ()
    policy: Annotated[MemoryPolicy | None, BeforeValidator(_policy_from)] = None


Step = RecallRecord | RefinementRecord
"""What happens between two compactions."""


@dataclass(frozen=True)
class CompactionRecord:
    """A segment that a compaction made. The compaction began when the cache held `at_tokens` logical tokens.

    Attributes:
        continues: the segment before it was made by the same compaction.
        conversations: self-study's prompts and answers, as token ids. A repeated compaction reads them and does not
            generate them again, because rounding alone may change what a model generates.
        summary: took the place of the block, if the policy asked for one; also read again.
        lag_tokens: how many more tokens the cache held when the result was swapped in.
        live_start: the first token whose live queries were available, if the policy uses them.
        recalls: pages that were recalled or compacted again between this compaction and the next.
        refinements: new slots for segments, also between this compaction and the next. They commute with recalls.
        policy: the one that the compaction followed. None: the context's own, or one that no file can hold.
    """

    at_tokens: int
    plan: Plan
    conversations: tuple[tuple[int, ...], ...] = ()
    summary: Summary | None = None
    lag_tokens: int = 0
    live_start: int = 0
    recalls: tuple[RecallRecord, ...] = ()
    refinements: tuple[RefinementRecord, ...] = ()
    policy: Annotated[MemoryPolicy | None, BeforeValidator(_policy_from)] = None
    continues: bool = False

    @property
    def steps(self) -> list[Step]:
        """Recalls and refinements between this compaction and the next, in the order of their positions."""
        return sorted((*self.recalls, *self.refinements), key=lambda step: step.at_tokens)

    @property
    def swapped_at(self) -> int:
        """Logical tokens in the cache when the result was swapped in."""
        return self.at_tokens + self.lag_tokens

    def within(self, num_tokens: int) -> CompactionRecord:
        """The record after the cache goes back to `num_tokens`; what came later than that moves to there.

        Args:
            num_tokens: at least `at_tokens`, because the compaction depends on all tokens that it saw.
        """
        assert self.at_tokens <= num_tokens
        return replace(
            self,
            lag_tokens=min(self.swapped_at, num_tokens) - self.at_tokens,
            recalls=tuple(recall._replace(at_tokens=min(recall.at_tokens, num_tokens)) for recall in self.recalls),
            refinements=tuple(replace(one, at_tokens=min(one.at_tokens, num_tokens)) for one in self.refinements),
        )


def by_compaction(records: Iterable[CompactionRecord]) -> list[list[CompactionRecord]]:
    """The records of each compaction, in order."""
    found: list[list[CompactionRecord]] = []
    for record in records:
        if record.continues and found:
            found[-1].append(record)
        else:
            found.append([record])
    return found


def with_policy(policy: MemoryPolicy | None, records: Iterable[CompactionRecord]) -> list[CompactionRecord]:
    """Write a context's policy into its records, before the context continues under another one.

    Args:
        policy: None: not known.
    """
    return [
        replace(
            record,
            refinements=tuple(replace(one, policy=one.policy or policy) for one in record.refinements),
            policy=record.policy or policy,
        )
        for record in records
    ]
