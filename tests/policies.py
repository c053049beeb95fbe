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


def plain_policy(**changes: Any) -> MemoryPolicy:
    """A policy without recall that says what most counts depend on."""
    return MemoryPolicy(**{**_SAID, **changes})
