"""What a saved session has to be before it goes on with a model. Knows no store."""

from __future__ import annotations

from am_memory.engines.base import ModelInfo
from am_memory.errors import ModelMismatch
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
