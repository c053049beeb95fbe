"""Every error that this project raises. Each message names the value, the limit and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from am_memory.formatting import shortened

MAX_VALUE_CHARS = 200
"""Characters of an invalid value that a message shows."""


class AMMemoryError(Exception):
    """Base class: catching it catches everything that `am_memory` raises on purpose."""


class ModelNotFound(AMMemoryError):
    """There is no model of the given name, or at the given path."""


class UnsupportedModel(AMMemoryError):
    """The model's attention or cache cannot be compacted (recurrent, latent, multi-axis RoPE, encoder-decoder...)."""


class EncodingNotFound(AMMemoryError):
    """tiktoken has no such encoding, or its file is not on this machine and cannot be downloaded."""


class InvalidPolicy(AMMemoryError):
    """A policy that cannot work, whatever the conversation."""


class BudgetTooSmall(InvalidPolicy):
    """A compaction would leave a head fewer slots than the least that the policy allows."""


class InvalidInput(AMMemoryError):
    """An argument that a call cannot use: empty input, unknown token ids, a number outside its range..."""


class PromptTooLong(AMMemoryError):
    """A prompt that does not fit, even after compaction."""


class SessionNotFound(AMMemoryError):
    """No session of that name, in memory or in the store."""


class TextNotFound(AMMemoryError):
    """No compact text of that name, in memory or in the store.

    Args:
        name: the name.
        known: the names that there are.
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no compact text {name!r}; there are: {', '.join(map(repr, known)) or 'none'}")
        self.name = name


class StorageError(AMMemoryError):
    """A store cannot be reached, or a session cannot be saved or read: corrupt, of another format or model."""


class CorruptSession(StorageError):
    """The saved session was altered, or cannot be a session of this model."""


class NewerFormat(StorageError):
    """The session was saved by a newer version of this project."""


class OlderFormat(StorageError):
    """The session was saved by an older version of this project, in a format that this version no longer reads."""


class ModelMismatch(StorageError):
    """The session was saved with another model, another tokenizer or another chat template."""


class SessionChanged(StorageError):
    """Another session was saved under this name since this one was read or saved; saving would overwrite it."""


class SessionDeleted(StorageError):
    """The session was deleted; saving would bring it back."""


class OriginalLost(StorageError):
    """The exact entries of compacted tokens are missing or damaged; the session goes on without them."""


class EngineFailed(AMMemoryError):
    """The library that runs the model failed; the session is as it was before the call."""


class CompactionFailed(AMMemoryError):
    """A compaction failed; the session is as it was before it."""


class UnsupportedOperation(AMMemoryError):
    """A call that a compacted cache cannot serve (batches, beams, padding)."""


def require_room(kept: str, **limits: int) -> None:
    """Raise InvalidInput for a limit below 1 on what is kept."""
    for name, limit in limits.items():
        if limit < 1:
            raise InvalidInput(f"{name} is {limit}: give what kept {kept} may take, at least 1")


def is_whole(value: object) -> bool:
    """Whether a value is a whole number. Booleans are not, although Python takes them for 1 and 0."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_whole(least: int, **numbers: Any) -> None:
    """Raise InvalidInput for a value that is not a whole number, or is below `least`."""
    for name, number in numbers.items():
        if not is_whole(number) or number < least:
            raise InvalidInput(f"{name} is {number!r}: give a whole number, at least {least}")


def require_flags(**flags: object) -> None:
    """Raise InvalidInput for a value other than True, False and None."""
    for name, flag in flags.items():
        if flag is not None and not isinstance(flag, bool):
            raise InvalidInput(f"{name} is {flag!r}: give True or False")


def require_kind(kind: type, **values: object) -> None:
    """Raise InvalidInput for a value that is neither None nor of this class."""
    for name, value in values.items():
        if value is not None and not isinstance(value, kind):
            raise InvalidInput(f"{name} is {shortened(repr(value), MAX_VALUE_CHARS)}: give a {kind.__name__}")


def how_to_install(extra: str) -> str:
    """How to install one of this project's extras, for errors about a package that is missing."""
    return f"install attention-matching-memory[{extra}]; in a clone: pip install -e '.[{extra}]'"


def unknown(given: Iterable[str], known: Iterable[str]) -> str:
    """The unknown names in one line, each with the known name nearest to it; "" if all are known."""
    names = sorted(known)
    return ", ".join(f"{name}{_nearest(name, names)}" for name in given if name not in names)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def problems(errors: Iterable[Mapping[str, Any]], names: Iterable[str], *, shows_values: bool = True) -> str:
    """The problems that pydantic found, in one line.

    Args:
        errors: as a `ValidationError` lists them.
        names: the fields of the model, to suggest the nearest one.
        shows_values: show the invalid values; False where one of them may be a secret.
    """
    messages: dict[str, dict[str, None]] = {}  # a field that takes one of two types has a message for each
    for error in errors:
        place, message = _problem(error, [*names], shows_value=shows_values)
        messages.setdefault(place, {})[message] = None
    return "; ".join(place + ", or: ".join(each) for place, each in messages.items())


def _problem(error: Mapping[str, Any], names: Sequence[str], *, shows_value: bool) -> tuple[str, str]:
    """The field with its value, and what is wrong with it."""
    # pydantic also puts the type that it tried into the path of the field, for example "constrained-int".
    path = ".".join(str(part) for part in error["loc"] if isinstance(part, int) or part.isidentifier())
    if error["type"] == "extra_forbidden":
        unknown_name = unknown([".".join(map(str, error["loc"]))], names)
        return f"there is no {unknown_name}", ""
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path:
        return "", message
    value = f" {shortened(repr(error['input']), MAX_VALUE_CHARS)}" if shows_value else ""
    return f"{path}{value}: ", message
