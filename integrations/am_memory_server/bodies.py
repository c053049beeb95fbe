"""Objects in the bodies of requests: nulls count as unset, unknown names are ignored or refused. Knows no endpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from am_memory.errors import unknown
from am_memory.formatting import shortened

MAX_NAMES = 100
"""Names in one object of a request."""
MAX_NAME_CHARS = 100
"""Characters of an unknown name that are compared with the known names and shown."""
UNKNOWN_NAME = "unknown_name"
"""Type of the validation error for an unknown name; its context has the `name`."""
WARNING_HEADER = "X-AM-Memory-Warning"
MAX_WARNING_CHARS = 500
UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


@dataclass
class UnknownNames:
    """What happens to unknown names while a request is validated.

    Attributes:
        is_strict: they are refused.
        ignored: those that were ignored, each once, with the nearest known one.
    """

    is_strict: bool = False
    ignored: dict[str, None] = field(default_factory=dict)

    @property
    def headers(self) -> Mapping[str, str]:
        """A header that names what was ignored; none if nothing was. A header holds printable ASCII only."""
        if not self.ignored:
            return {}
        text = f"ignored, because this server does not know it: {', '.join(self.ignored)}"
        return {WARNING_HEADER: UNPRINTABLE.sub("?", shortened(text, MAX_WARNING_CHARS)).strip()}


_UNKNOWN: ContextVar[UnknownNames | None] = ContextVar("unknown names", default=None)


@contextmanager
def watching_names(*, is_strict: bool) -> Iterator[UnknownNames]:
    """Collect the unknown names of the objects that are validated in this block, or refuse them."""
    names = UnknownNames(is_strict)
    token = _UNKNOWN.set(names)
    try:
        yield names
    finally:
        _UNKNOWN.reset(token)


def few_names(values: Any) -> Any:
    """Refuse an object with many names: pydantic would keep a large error for each wrong one."""
    if isinstance(values, dict) and len(values) > MAX_NAMES:
        raise ValueError(f"it has {len(values)} names: give {MAX_NAMES} at most")
    return values


def without_nulls(values: Any) -> Any:
    """An object without the names whose value is null."""
    return {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values


class Part(BaseModel):
    """An object inside a message or a tool. Unknown names, which other servers add, are ignored without a word."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_no_nulls(cls, body: Any) -> Any:
        return without_nulls(body)


class Body(BaseModel):
    """An object of OpenAI's API. Unknown names are ignored with a warning, or refused by a strict server."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)
    always_strict: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _has_known_names(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = {name for key, field in cls.model_fields.items() for name in (key, field.alias) if name}
        if strange := [str(name)[:MAX_NAME_CHARS] for name in few_names(body) if name not in known]:
            names = _UNKNOWN.get()
            if cls.always_strict or (names is not None and names.is_strict):
                context = {"unknown": unknown(strange, known), "name": strange[0]}
                raise PydanticCustomError(UNKNOWN_NAME, "there is no {unknown}", context)
            if names is not None:
                names.ignored |= {unknown([name], known): None for name in strange}
        return without_nulls(body)


class StrictBody(Body):
    """An object of this server's own API. Unknown names are always refused: a typing error would do something else."""

    always_strict = True
