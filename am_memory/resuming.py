"""What a saved session has to be before it goes on with a model. Knows no store."""

from __future__ import annotations

from am_memory.engines.base import ModelInfo
from am_memory.errors import InvalidPolicy, ModelMismatch, StorageError
from am_memory.events import PolicyChange
from am_memory.policy import MemoryPolicy
from am_memory.session_file import SavedSession


def check_origin(name: str, saved: SavedSession, info: ModelInfo) -> tuple[str, ...]:
    """Check that a session was saved with this model, this tokenizer and, where it has messages, this chat template.

    Returns:
        Of which of them nobody has said what they were when it was saved.

    Raises:
        ModelMismatch: with another, by name.
    """
    parts = [
        ("model", saved.fingerprint, info.fingerprint),
        ("tokenizer", saved.tokenizer_fingerprint, info.tokenizer_fingerprint),
    ]
    if saved.messages:
        parts.append(("chat template", saved.template_fingerprint, info.template_fingerprint))
    others = [(what, before, now) for what, before, now in parts if before and now and before != now]
    if others:
        saved_with = " and ".join(f"{what} {before}" for what, before, _ in others)
        this = " and ".join(f"{what} {now}" for what, _, now in others)
        raise ModelMismatch(
            f"session {name!r} was saved with {saved_with}, and {info.name} has {this}: load the "
            f"{' and the '.join(what for what, *_ in others)} that it was saved with, or choose another name"
        )
    return tuple(what for what, before, now in parts if now and not before)


def policy_of(name: str, saved: SavedSession, policy: MemoryPolicy, *, is_default: bool) -> MemoryPolicy:
    """Under which policy a session goes on, where nobody names one: its own, if it had one, else the memory's.

    Args:
        policy: the memory's.
        is_default: nobody has asked for it, so that the saved one goes before it.

    Raises:
        StorageError: the saved policy is needed, and is none.
    """
    if not changes_of(saved, policy) or not (saved.has_own_policy or is_default):
        return policy
    try:
        if unknown := [field for field in saved.policy if field not in MemoryPolicy.model_fields]:
            raise InvalidPolicy(f"it has {', '.join(map(repr, unknown))}, which this version does not know")
        return MemoryPolicy(**saved.policy)
    except InvalidPolicy as error:
        raise StorageError(
            f"session {name!r} cannot go on under the policy that it was saved with: {error}; name one: "
            f"memory.session({name!r}, policy=...)"
        ) from error


def changes_of(saved: SavedSession, policy: MemoryPolicy) -> tuple[PolicyChange, ...]:
    """What another policy says otherwise than the one that a session was saved with."""
    before = {**MemoryPolicy().model_dump(mode="json"), **saved.policy}
    now = policy.model_dump(mode="json")
    return tuple(
        PolicyChange(field, before.get(field), now.get(field))
        for field in sorted({*before, *now})
        if before.get(field) != now.get(field)
    )
