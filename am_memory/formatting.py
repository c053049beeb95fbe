"""Numbers and texts as people read them: in reprs, tables and messages."""

from __future__ import annotations

MEBIBYTE = 2**20


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 token", "5,312 tokens"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def mebibytes(num_bytes: int) -> str:
    """A size with its unit: "1,024.0 MiB"."""
    return f"{num_bytes / MEBIBYTE:,.1f} MiB"


def cache_bytes(kv_bytes: int, exact_kv_bytes: int, num_compactions: int) -> str:
    """The bytes of a cache, and of an uncompacted one; before a compaction they differ by spare capacity."""
    held = mebibytes(kv_bytes)
    return f"{held} instead of {mebibytes(exact_kv_bytes)}" if num_compactions else held


def shortened(text: str, max_chars: int) -> str:
    """Both ends of a text that is longer than `max_chars`; a shorter text as it is."""
    half = max_chars // 2
    return text if len(text) <= max_chars else f"{text[:half]}...{text[-half:]}"
