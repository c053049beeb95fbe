"""`trigger` and `keep`: limits as LangChain's middleware writes them, as fields of a `MemoryPolicy`."""

from __future__ import annotations

from typing import Any

from am_memory import MemoryPolicy
from am_memory.errors import InvalidPolicy

Limit = int | float | tuple[str, int | float]
"""A number of tokens, a share below 1, ("tokens", a number) or ("fraction", a share)."""


def with_limits(policy: MemoryPolicy, *, trigger: Limit | None, keep: Limit | None) -> MemoryPolicy:
    """The policy, with `trigger` as its trigger_tokens and `keep` as its compact_fraction.

    Raises:
        InvalidPolicy: a limit in another unit, or one that leaves nothing to compact.
    """
    changes: dict[str, Any] = {}
    if trigger is not None:
        changes["trigger_tokens"] = _tokens_or_share("trigger", trigger)
    if keep is not None:
        changes["compact_fraction"] = _compact_fraction(keep, changes.get("trigger_tokens", policy.trigger_tokens))
    return policy.with_changes(**changes)


def _tokens_or_share(name: str, limit: Limit) -> int | float:
    """A whole number of tokens, or a float, which is a share."""
    match limit:
        case ("messages", int(size)):
            raise InvalidPolicy(
                f'{name}=("messages", {size}): a cache is measured in tokens, and one message may be longer than all '
                f'of it: give {name}=("tokens", {100 * size:,}) at some 100 tokens a message, or ("fraction", a share)'
            )
        case bool() | (_, bool()):
            pass
        case int(size) | ("tokens", int(size)):
            return size
        case float(share) | ("fraction", int(share) | float(share)):
            return float(share)
    raise InvalidPolicy(f'{name}={limit!r}: give a number of tokens, ("tokens", a number) or ("fraction", a share)')


def _compact_fraction(keep: Limit, trigger: float) -> float:
    kept = _tokens_or_share("keep", keep)
    if isinstance(kept, float):
        if not 0 <= kept < 1:
            raise InvalidPolicy(f"keep={keep} is not a share: give at least 0 and less than 1, such as 0.5")
        return 1 - kept
    if isinstance(trigger, float):
        raise InvalidPolicy(
            f"keep={keep} in tokens needs a trigger in tokens, not {trigger:.0%} of the window: give trigger=2048, "
            'or keep=("fraction", ...)'
        )
    if not 0 <= kept < trigger:
        raise InvalidPolicy(
            f"keep={kept:,} tokens and trigger={trigger:,} tokens leave nothing to compact: keep must be at least 0 "
            "and below trigger; lower keep, or raise trigger"
        )
    return 1 - kept / trigger
