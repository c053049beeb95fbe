"""How a key selection is written in files and digests: by its name and its parameters. Knows no policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from pydantic import TypeAdapter, ValidationError

from am_memory.errors import InvalidInput, problems
from am_memory.solver.keys import HighestAttention, KeySelection
from am_memory.solver.omp import OMP

SHIPPED: tuple[KeySelection, ...] = (HighestAttention(), OMP(), OMP.fast())
_BUILT_IN = {selection.name: selection for selection in SHIPPED}


def as_selection(value: object) -> KeySelection:
    """The selection for a name, for what `parameters` returned, or for an object that is one.

    Raises:
        InvalidInput: the value is none of these; or it is an object with the name of a built-in selection, or with a
            field that JSON cannot hold.
    """
    if isinstance(value, str) and value in _BUILT_IN:
        return _BUILT_IN[value]
    if isinstance(value, Mapping) and value.get("name") in _BUILT_IN:
        return _from_parameters(_BUILT_IN[value["name"]], value)
    if isinstance(value, Mapping) or not isinstance(value, KeySelection):
        problem = "is not built in: pass the object itself" if isinstance(value, Mapping) else "is no key selection"
        raise InvalidInput(f"{problem}; must be {', '.join(_BUILT_IN)}, or an object with `name` and `__call__`")
    parameters(value)
    return value


def parameters(selection: KeySelection) -> str | dict[str, object]:
    """A selection as JSON. Two selections with equal parameters choose the same keys.

    Returns:
        For a built-in selection its name, with the fields that differ from the defaults of that name. For any other
        object its name and all its fields: the compared fields of a dataclass, else the attributes.

    Raises:
        InvalidInput: JSON cannot hold a field; or the name belongs to a built-in selection, and the object is another.
    """
    if not isinstance(selection.name, str):
        raise InvalidInput(f"a key selection's name is {selection.name!r}; it must be a str")
    built_in = _BUILT_IN.get(selection.name)
    if built_in is not None and type(selection) is not type(built_in):
        raise InvalidInput(f"{selection.name!r} is the name of a built-in selection: give yours another name")
    held = _fields(selection)
    if built_in is not None:
        held = {name: value for name, value in held.items() if value != getattr(built_in, name)}
        if not held:
            return selection.name
    try:
        written: dict[str, object] = json.loads(json.dumps({**held, "name": selection.name}))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"key selection {selection.name!r} cannot be written to a file: {error}; make it a dataclass whose "
            "fields are numbers and strings, and mark fields that do not change its choice with field(compare=False)"
        ) from error
    return written


def _fields(selection: object) -> dict[str, object]:
    if is_dataclass(selection):
        return {field.name: getattr(selection, field.name) for field in fields(selection) if field.compare}
    return dict(getattr(selection, "__dict__", {}))


def _from_parameters(built_in: KeySelection, given: Mapping[str, object]) -> KeySelection:
    held = _fields(built_in)
    if unknown := [name for name in given if name not in held]:
        raise InvalidInput(f"{built_in.name!r} has no {', '.join(map(str, unknown))}; it has {', '.join(held)}")
    try:
        return TypeAdapter(type(built_in)).validate_python({**held, **given})
    except ValidationError as error:
        raise InvalidInput(problems(error.errors(), held)) from error
