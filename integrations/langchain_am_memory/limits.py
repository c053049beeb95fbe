"""`trigger` and `keep`: limits as LangChain's middleware writes them, as fields of a `MemoryPolicy`."""

from __future__ import annotations

from typing import Any

from am_memory import MemoryPolicy
from am_memory.errors import InvalidPolicy

Limit = tuple[str, int | float]
"""("tokens", a number) or ("fraction", a share)."""


def with_limits(policy: MemoryPolicy, *, trigger: Limit | None, keep: Limit | None) -> MemoryPolicy:
    """The policy, with `trigger` as its trigger_tokens and `keep` as its compact_fraction.

    Raises:
        InvalidPolicy: a limit in another unit, or one that leaves nothing to compact.
    """
    changes: dict[str, Any] = {}
    for name, limit in (("trigger", trigger), ("keep", keep)):
        if limit is not None and limit[0] not in ("tokens", "fraction"):
            raise InvalidPolicy(f'{name}={limit}: give ("tokens", a number) or ("fraction", a share)')
    if trigger is not None:
        kind, size = trigger
        changes["trigger_tokens"] = int(size) if kind == "tokens" else float(size)
    if keep is not None:
        changes["compact_fraction"] = _compact_fraction(keep, changes.get("trigger_tokens", policy.trigger_tokens))
    return policy.with_changes(**changes)


def _compact_fraction(keep: Limit, trigger: float) -> float:
    kind, size = keep
    if kind == "tokens" and isinstance(trigger, float):
        raise InvalidPolicy(
            f"keep={keep} in tokens needs a trigger in tokens, not {trigger:.0%} of the window: give "
            'trigger=("tokens", ...), or keep=("fraction", ...)'
        )
    whole = trigger if kind == "tokens" else 1
    if not 0 <= size < whole:
        raise InvalidPolicy(
            f"keep={keep} with a trigger of {trigger}: what a compaction leaves exact is at least 0 and "
            f"below {whole}; lower keep, or raise trigger"
        )
    return 1 - size / whole
