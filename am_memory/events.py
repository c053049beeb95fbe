"""What long work reports while it runs; the command line and the integrations turn these into bars, logs and metrics.

Knows nothing of who listens. A listener is a plain callable; it must not touch the session it hears about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

logger = logging.getLogger("am_memory")


@dataclass(frozen=True)
class ReadProgress:
    """Tokens of one `append` (or of a prompt) read so far."""

    session: str
    done_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class CompactionStarted:
    """A compaction of the logical tokens [start, end) begins."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class CompactionProgress:
    """One stage of a compaction moved on; `stage` is "summary", "self_study", "repeat", "score" or "fit"."""

    session: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class CompactionReport:
    """What one compaction did.

    Attributes:
        start, end: the logical tokens that became a segment.
        num_slots: mean slots per KV head of the new segment.
        kv_tokens_before, kv_tokens_after: exact tokens + mean compact slots per head, when it was swapped in.
        kv_bytes_before, kv_bytes_after: bytes of the cache's tensors.
        mass_error: RMS over heads and queries of the relative error of the block's attention mass.
        output_error: RMS over heads and queries of the output's error, relative to the output's RMS.
        query_seconds, score_seconds, fit_seconds: wall time by stage.
        num_unbiased_heads: KV heads that do without biases, as the cache takes none and theirs are not a part of a key.
        held_out_error: the output error on queries that were held out of the fits; None where the policy has no gate.
        summary_tokens: of the summary that took the tokens' place, and was compacted; 0: there was none.
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
        return self.query_seconds + self.score_seconds + self.fit_seconds


@dataclass(frozen=True)
class CompactionFinished:
    session: str
    report: CompactionReport


@dataclass(frozen=True)
class GateMissed:
    """The tokens [start, end) were compacted with an error above `max_error`: there was no room for more slots."""

    session: str
    start: int
    end: int
    held_out_error: float
    max_error: float


@dataclass(frozen=True)
class WindowExceeded:
    """The logical length went past the positions that the model was trained on.

    Attributes:
        immovable: why what is compact cannot be moved up to stay within as many positions; None: it is moved.
    """

    session: str
    logical_tokens: int
    window_tokens: int
    immovable: str | None = None

    def __str__(self) -> str:
        moved = "what is compact is moved up" if self.immovable is None else f"what is compact stays: {self.immovable}"
        return (
            f"{self.logical_tokens:,} tokens, past the {self.window_tokens:,} positions that the model was trained on; "
            f"{moved}"
        )


@dataclass(frozen=True)
class SessionRebuilt:
    """The tokens were read again, because the wanted state lies inside a compacted span."""

    session: str
    num_tokens: int
    reason: str


@dataclass(frozen=True)
class SpanRecalled:
    """The segment of the logical tokens [start, end) is exact again; the cache has `kv_tokens` now."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class SpanPutAway:
    """The segment of the logical tokens [start, end) is compact again, as it was before it was recalled."""

    session: str
    start: int
    end: int
    kv_tokens: float


@dataclass(frozen=True)
class OriginalsLost:
    """The exact entries of the tokens [start, end) are gone: they cannot be recalled, and nothing else changes."""

    session: str
    start: int
    end: int
    reason: str


@dataclass(frozen=True)
class OriginUnknown:
    """A saved session goes on, and nothing says whether it was saved with the same `parts`: "tokenizer", "model"..."""

    session: str
    parts: tuple[str, ...]


class PolicyChange(NamedTuple):
    """A field of a policy, as JSON has it."""

    field: str
    before: object
    now: object


@dataclass(frozen=True)
class PolicyChanged:
    """A saved session goes on under another policy than it was saved with, as the memory was given one."""

    session: str
    changes: tuple[PolicyChange, ...]

    def __str__(self) -> str:
        told = ", ".join(f"{field} {now!r} instead of {before!r}" for field, before, now in self.changes)
        return f"session {self.session!r} goes on under another policy than it was saved with: {told}"


Event = (
    ReadProgress
    | CompactionStarted
    | CompactionProgress
    | CompactionFinished
    | GateMissed
    | WindowExceeded
    | SessionRebuilt
    | SpanRecalled
    | SpanPutAway
    | OriginalsLost
    | OriginUnknown
    | PolicyChanged
)
Listener = Callable[[Event], None]


def log(event: Event) -> None:
    """Write what matters to the logger `am_memory`, at level INFO."""
    match event:
        case CompactionFinished(session, report):
            logger.info(
                "session %r: tokens %d to %d compacted to %.1f slots a head in %.2f s; cache from %.0f to %.0f tokens",
                session,
                report.start,
                report.end,
                report.num_slots,
                report.seconds,
                report.kv_tokens_before,
                report.kv_tokens_after,
            )
        case GateMissed(session, start, end, held_out_error, max_error):
            logger.info(
                "session %r: tokens %d to %d are compacted with a held-out error of %.3f, above the %.3f of max_error: "
                "there was no room for more slots",
                session,
                start,
                end,
                held_out_error,
                max_error,
            )
        case WindowExceeded(session):
            logger.info("session %r has %s", session, event)
        case SessionRebuilt(session, num_tokens, reason):
            logger.info("session %r: %d tokens are read again: %s", session, num_tokens, reason)
        case SpanRecalled(session, start, end, kv_tokens):
            logger.info("session %r: tokens %d to %d recalled; cache has %.0f tokens", session, start, end, kv_tokens)
        case PolicyChanged():
            logger.warning("%s", event)
        case OriginUnknown(session, parts):
            logger.warning(
                "session %r does not say with which %s it was saved: it is taken for this model's",
                session,
                " and ".join(parts),
            )
        case OriginalsLost(session, start, end, reason):
            logger.warning("session %r: the originals of tokens %d to %d are lost: %s", session, start, end, reason)
        case SpanPutAway(session, start, end, kv_tokens):
            logger.info("session %r: tokens %d to %d put away; cache has %.0f tokens", session, start, end, kv_tokens)


def ignore(event: Event) -> None:
    """The listener of those who do not listen."""
