"""Every error this project raises. Each message names the value, the limit and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

MAX_VALUE_CHARS = 100
"""Of what is wrong, each end is told."""


class AMMemoryError(Exception):
    """Base class: catching it catches everything that `am_memory` raises on purpose."""


class ModelNotFound(AMMemoryError):
    """No model lies at the given place."""


class UnsupportedModel(AMMemoryError):
    """The model's attention or cache cannot be compacted (recurrent, latent, multi-axis RoPE, encoder-decoder...)."""


class EncodingNotFound(AMMemoryError):
    """tiktoken has no such encoding, or its file is not on this machine and cannot be downloaded."""


class InvalidPolicy(AMMemoryError):
    """A policy that can never work, whatever the conversation."""


class BudgetTooSmall(InvalidPolicy):
    """A compaction would leave a head fewer slots than its floor."""


class InvalidInput(AMMemoryError):
    """Empty input, or token ids that the model does not have."""


class PromptTooLong(AMMemoryError):
    """A prompt that cannot be held, even after compaction."""


class SessionNotFound(AMMemoryError):
    """No session of that name, in memory or in the store."""


class StorageError(AMMemoryError):
    """A store out of reach, or a session that cannot be saved or read: corrupted, of another format or model."""


class CorruptSession(StorageError):
    """The saved bytes are not what was written."""


class NewerFormat(StorageError):
    """The session was saved by a newer version of this project."""


class OlderFormat(StorageError):
    """The session was saved by an older version of this project, in a format that this version no longer reads."""


class ModelMismatch(StorageError):
    """The session was saved with another model, another tokenizer or another chat template."""


class SessionChanged(StorageError):
    """What is saved under the session's name is not what it went on from: saving it would lose what another saved."""


class SessionDeleted(StorageError):
    """The session was deleted, and saving it would bring it back."""


class OriginalLost(StorageError):
    """The exact entries of compacted tokens are not what was kept; the session goes on without them."""


class EngineFailed(AMMemoryError):
    """The library that runs the model failed at what it was asked; the session is as it was before."""


class CompactionFailed(AMMemoryError):
    """A compaction could not be made; the session is as it was before it."""


class UnsupportedOperation(AMMemoryError):
    """A call that a compacted cache cannot serve (batches, beams, padding)."""


def require_room(kept: str, **limits: int) -> None:
    """Raise InvalidInput for a limit that leaves no room for what is to be kept."""
    for name, limit in limits.items():
        if limit < 1:
            raise InvalidInput(f"{name} is {limit}: give what kept {kept} may take, at least 1")


def is_whole(value: object) -> bool:
    """Whether it is a whole number, and neither True nor False, which Python takes for 1 and 0."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_whole(least: int, **numbers: Any) -> None:
    """Raise InvalidInput for what is no whole number, or less than `least`."""
    for name, number in numbers.items():
        if not is_whole(number) or number < least:
            raise InvalidInput(f"{name} is {number!r}: give a whole number, at least {least}")


def require_flags(**flags: object) -> None:
    """Raise InvalidInput for what is neither True nor False, nor None, which leaves it open."""
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise InvalidInput(f"{name} is {flag!r}: give True or False")


def unknown(given: Iterable[str], known: Iterable[str]) -> str:
    """The names that are not known, each with the one that it may be meant for; "" where there are none."""
    names = sorted(known)
    return ", ".join(f"{name}{_nearest(name, names)}" for name in given if name not in names)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def problems(errors: Iterable[Mapping[str, Any]], names: Iterable[str], *, shows_values: bool = True) -> str:
    """What pydantic found, in one line.

    Args:
        errors: as a `ValidationError` lists them.
        names: of the fields that there are.
        shows_values: not where one of them may be a secret.
    """
    return "; ".join(_problem(error, [*names], shows_value=shows_values) for error in errors)


def _problem(error: Mapping[str, Any], names: Sequence[str], *, shows_value: bool) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"there is no {unknown([place], names)}"
    value = f" {_shortened(repr(error['input']))}" if shows_value else ""
    return f"{place}{value}: {error['msg']}"


def _shortened(text: str) -> str:
    return text if len(text) <= 2 * MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}...{text[-MAX_VALUE_CHARS:]}"
