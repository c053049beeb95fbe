"""Policies of tests that count: sizes, compactions and bytes must not follow the defaults when these change."""

from __future__ import annotations

from typing import Any

from am_memory import MemoryPolicy

_SAID: dict[str, Any] = {
    "compact_fraction": 0.5,
    "keep_ratio": 0.1,
    "reference_queries": ("repeat",),
    "key_selection": "highest_attention",
    "originals": "drop",
}


def originals_policy(**changes: Any) -> MemoryPolicy:
    """A small policy that keeps originals, and recalls nothing by itself."""
    small = {"trigger_tokens": 128, "keep_ratio": 0.25, "keep_recent": 8, "pinned": 3, "chunk_tokens": 32}
    return plain_policy(**{**small, "originals": "host", "recall_tokens": 0, "head_budget": "adaptive", **changes})


def tight_policy(**changes: Any) -> MemoryPolicy:
    """A small policy without recall, under which short texts are compacted several times."""
    tight = {"trigger_tokens": 96, "keep_ratio": 0.25, "keep_recent": 6, "pinned": 3, "chunk_tokens": 16}
    return plain_policy(**{**tight, **changes})


def plain_policy(**changes: Any) -> MemoryPolicy:
    """A policy without recall that says what most counts depend on."""
    return MemoryPolicy(**{**_SAID, **changes})
