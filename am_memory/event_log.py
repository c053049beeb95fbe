"""Events as lines of the logger `am_memory`."""

from __future__ import annotations

import logging

from am_memory.events import (
    CompactionFinished,
    Event,
    GateMissed,
    LittleKept,
    MemoryConsulted,
    OriginalsDropped,
    OriginalsLost,
    OriginUnknown,
    PolicyChanged,
    SegmentRefined,
    SessionRebuilt,
    SpanPutAway,
    SpanRecalled,
    TextMounted,
    TextUnmounted,
    WindowExceeded,
)

logger = logging.getLogger("am_memory")


def log(event: Event) -> None:
    """Write the main events to the logger `am_memory`: warnings for what may surprise, INFO for the rest."""
    match event:
        case CompactionFinished(session, report):
            logger.info(
                "session %r: tokens %d to %d compacted to %.1f slots per head in %.2f s; cache: %.0f to %.0f tokens",
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
                "session %r: tokens %d to %d are compacted with a held-out error of %.3f, above max_error %.3f: "
                "no more slots fitted",
                session,
                start,
                end,
                held_out_error,
                max_error,
            )
        case WindowExceeded(session) | SegmentRefined(session):
            logger.info("session %r has %s", session, event)
        case SessionRebuilt(session, num_tokens, reason):
            logger.info("session %r: %d tokens are read again: %s", session, num_tokens, reason)
        case MemoryConsulted(session, at_tokens, spans, _):
            found = "; ".join(f"{span.start} to {span.end}" for span in spans)
            logger.info("session %r: at token %d these tokens were looked up: %s", session, at_tokens, found)
        case SpanRecalled(session, start, end, kv_tokens) | SpanPutAway(session, start, end, kv_tokens):
            now = "exact" if isinstance(event, SpanRecalled) else "compact"
            logger.info(
                "session %r: tokens %d to %d are %s again; cache has %.0f tokens", session, start, end, now, kv_tokens
            )
        case TextMounted() | TextUnmounted():
            logger.info("%s", event)
        case LittleKept(session, num_slots, num_tokens):
            logger.warning(
                "session %r: %.0f slots per head stand for %d compacted tokens, less than 5 %%: raise "
                "max_compact_tokens or trigger_tokens to keep more of a long past",
                session,
                num_slots,
                num_tokens,
            )
        case PolicyChanged():
            logger.warning("%s", event)
        case OriginUnknown(session, parts):
            logger.warning(
                "session %r does not record which %s it was saved with: it is assumed to be this model's",
                session,
                " and ".join(parts),
            )
        case OriginalsLost(session, start, end, reason):
            logger.warning("session %r: the originals of tokens %d to %d are lost: %s", session, start, end, reason)
        case OriginalsDropped(session, start, end, reason):
            logger.info("session %r: the originals of tokens %d to %d are dropped: %s", session, start, end, reason)
