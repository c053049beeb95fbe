"""Events that long work emits; the command line and the integrations turn them into bars, logs and metrics.

Knows no listener. A listener is a plain callable, and must not use the session that an event is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class ReadProgress:
    """Some tokens of an `append` or a prompt were read: `done_tokens` of `total_tokens`."""

    session: str
    done_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class SearchHeadsProgress:
    """The model's search heads are measured, once for each model: `done_texts` of `total_texts` were read."""

    session: str
    done_texts: int
    total_texts: int


@dataclass(frozen=True)
class CompactionStarted:
    """A compaction of the tokens [start, end) of the conversation begins; the cache has `kv_tokens` now."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class CompactionProgress:
    """A stage of a compaction or a refinement has come a third further; the last of its three events ends it.

    Stages: "summary", "self_study", "predict", "repeat", "score" and "fit". A refinement begins with "read": it reads
    again what stood behind the segment. The first compaction of a model may have "measure": the model reads and repeats
    1,800 tokens.
    """

    session: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class CompactionReport:
    """The result of one compaction, in numbers.

    Attributes:
        start, end: the tokens [start, end) of the conversation became a segment, or several.
        num_slots: mean slots per KV head of the new segments.
        kv_tokens_before, kv_tokens_after: size of the cache when they were swapped in: exact tokens plus mean
            compact slots per KV head.
        kv_bytes_before, kv_bytes_after: bytes of the cache's tensors.
        mass_error: RMS over heads and queries of the relative error of the block's attention mass.
        output_error: RMS over heads and queries of the output's error, relative to the output's RMS.
        query_seconds, score_seconds, fit_seconds: wall time by stage.
        num_unbiased_heads: KV heads without biases: the cache has none, and a key could not take them in either.
        held_out_error: the output error on queries that no fit has seen; None if the policy has no `max_error`.
        summary_tokens: length of the summary that was compacted in place of the tokens; 0: none was written.
    """

    session: str
    start: int
    end: int
    num_slots: float
    kv_tokens_before: float
    kv_tokens_after: float
    kv_bytes_before: int
    kv_bytes_after: int
    mass_error: float
    output_error: float
    query_seconds: float
    score_seconds: float
    fit_seconds: float
    num_unbiased_heads: int = 0
    held_out_error: float | None = None
    summary_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Wall time of the whole compaction."""
        return self.query_seconds + self.score_seconds + self.fit_seconds

    @classmethod
    def joined(cls, reports: Sequence[CompactionReport]) -> CompactionReport:
        """One report of consecutive segments that were compacted at once; with a gate there is only one."""
        first, last = reports[0], reports[-1]
        if first is last:
            return first

        def mean_square(errors: Iterable[float]) -> float:
            weighted = (error**2 * (one.end - one.start) for error, one in zip(errors, reports, strict=True))
            return math.sqrt(sum(weighted) / (last.end - first.start))

        return replace(
            last,
            start=first.start,
            num_slots=sum(one.num_slots for one in reports),
            kv_tokens_before=first.kv_tokens_before,
            kv_bytes_before=first.kv_bytes_before,
            mass_error=mean_square(one.mass_error for one in reports),
            output_error=mean_square(one.output_error for one in reports),
            query_seconds=sum(one.query_seconds for one in reports),
            score_seconds=sum(one.score_seconds for one in reports),
            fit_seconds=sum(one.fit_seconds for one in reports),
            num_unbiased_heads=max(one.num_unbiased_heads for one in reports),
        )


@dataclass(frozen=True)
class CompactionFinished:
    """A compaction was swapped in."""

    session: str
    report: CompactionReport


@dataclass(frozen=True)
class GateMissed:
    """The tokens [start, end) were compacted with an error above `max_error`, because no more slots fitted."""

    session: str
    start: int
    end: int
    held_out_error: float
    max_error: float


@dataclass(frozen=True)
class LittleKept:
    """For the first time, the slots of all segments are less than a twentieth of the tokens that they stand for.

    The bound `max_compact_tokens` makes older segments shrink as the conversation grows. Details are then found by
    recall alone.

    Attributes:
        num_slots: compact slots, mean over heads.
        num_tokens: compacted tokens.
    """

    session: str
    num_slots: float
    num_tokens: int


@dataclass(frozen=True)
class SegmentRefined:
    """The segment of the tokens [start, end) was fitted again, to other queries, and has its new slots now.

    Attributes:
        num_slots: mean slots per KV head, as before.
        error_before, error_after: the attention output's error of the old and of the new slots, on the queries of the
            refinement; RMS over heads, relative to the output's RMS.
        seconds: wall time.
    """

    session: str
    start: int
    end: int
    num_slots: float
    error_before: float
    error_after: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"tokens {self.start:,} to {self.end:,} refined in {self.seconds:.2f} s; the error of their "
            f"{self.num_slots:.1f} slots per head was {self.error_before:.3f}, and is {self.error_after:.3f}"
        )


@dataclass(frozen=True)
class WindowExceeded:
    """The conversation is longer than the model's context window.

    Attributes:
        logical_tokens: tokens of the conversation.
        window_tokens: positions that the model was trained on.
        immovable: why compacted keys cannot be re-rotated to nearer positions; None: they are.
    """

    session: str
    logical_tokens: int
    window_tokens: int
    immovable: str | None = None

    def __str__(self) -> str:
        if self.immovable is None:
            outcome = "compacted keys are moved to nearer positions"
        else:
            outcome = f"answers may degrade, because compacted keys cannot be moved nearer: {self.immovable}"
        return (
            f"{self.logical_tokens:,} tokens, past the {self.window_tokens:,} positions that the model was trained on; "
            f"{outcome}"
        )


@dataclass(frozen=True)
class SessionRebuilt:
    """The first `num_tokens` tokens are read again, because the cache cannot simply be cut there."""

    session: str
    num_tokens: int
    reason: str


@dataclass(frozen=True)
class Span:
    """The tokens [start, end) of a conversation, or of a mounted text.

    Attributes:
        score: how much more attention they get from the search text than usual, and what rare words add, in nats.
        text: their text.
        mount: the name of the mounted text, whose tokens count from 0; None: they are of the conversation.
    """

    start: int
    end: int
    score: float
    text: str
    mount: str | None = None


@dataclass(frozen=True)
class MemoryConsulted:
    """A message, or what the model writes, looked for something compacted, and these spans are exact for it.

    Attributes:
        at_tokens: logical tokens of the conversation at that moment.
        spans: in the order of the tokens; some of them may have been exact before.
        kv_tokens: size of the cache with them.
    """

    session: str
    at_tokens: int
    spans: tuple[Span, ...]
    kv_tokens: float


@dataclass(frozen=True)
class SpanRecalled:
    """The tokens [start, end) are exact again; the cache has `kv_tokens` now."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class SpanPutAway:
    """The recalled tokens [start, end) are compact again, with the slots they had before."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class TextMounted:
    """A compact text stands beside the first `at_tokens` tokens of the conversation; the cache has `kv_tokens` now.

    Attributes:
        name: of the compact text.
        num_tokens: tokens of the text.
    """

    session: str
    name: str
    at_tokens: int
    num_tokens: int
    kv_tokens: float

    def __str__(self) -> str:
        return (
            f"session {self.session!r}: the text {self.name!r} of {self.num_tokens:,} tokens is mounted at token "
            f"{self.at_tokens:,}; cache has {self.kv_tokens:.0f} tokens"
        )


@dataclass(frozen=True)
class TextUnmounted:
    """A mounted text is gone from the token `at_tokens` on; the cache has `kv_tokens` now."""

    session: str
    name: str
    at_tokens: int
    kv_tokens: float

    def __str__(self) -> str:
        return (
            f"session {self.session!r}: the text {self.name!r} is unmounted at token {self.at_tokens:,}; cache has "
            f"{self.kv_tokens:.0f} tokens"
        )


@dataclass(frozen=True)
class OriginalsLost:
    """The exact entries of the tokens [start, end) are lost: they cannot be recalled. Nothing else changes."""

    session: str
    start: int
    end: int
    reason: str


@dataclass(frozen=True)
class OriginalsDropped:
    """The memory had no more room for the exact entries of the tokens [start, end): they cannot be recalled.

    `reason` names its bounds, `originals_bytes` and `originals_disk_bytes`.
    """

    session: str
    start: int
    end: int
    reason: str


@dataclass(frozen=True)
class OriginUnknown:
    """A saved session goes on, but does not record which `parts` ("model", "tokenizer"...) it was saved with."""

    session: str
    parts: tuple[str, ...]


class PolicyChange(NamedTuple):
    """A field of a policy with two values, as JSON."""

    field: str
    before: object
    now: object


@dataclass(frozen=True)
class PolicyChanged:
    """A saved session goes on under the memory's policy, which differs from the one it was saved under."""

    session: str
    changes: tuple[PolicyChange, ...]

    def __str__(self) -> str:
        changes = ", ".join(f"{field} {now!r} instead of {before!r}" for field, before, now in self.changes)
        return f"session {self.session!r} goes on under another policy than it was saved with: {changes}"


Event = (
    ReadProgress
    | SearchHeadsProgress
    | CompactionStarted
    | CompactionProgress
    | CompactionFinished
    | GateMissed
    | LittleKept
    | SegmentRefined
    | WindowExceeded
    | SessionRebuilt
    | MemoryConsulted
    | SpanRecalled
    | SpanPutAway
    | TextMounted
    | TextUnmounted
    | OriginalsLost
    | OriginalsDropped
    | OriginUnknown
    | PolicyChanged
)
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
