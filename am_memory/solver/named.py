"""What a key selection is known by, in files and digests: its name and its parameters. Knows no policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from pydantic import TypeAdapter, ValidationError

from am_memory.errors import InvalidInput
from am_memory.solver.keys import HighestAttention, KeySelection
from am_memory.solver.omp import OMP

_SHIPPED: dict[str, HighestAttention | OMP] = {
    selection.name: selection for selection in (HighestAttention(), OMP(), OMP.fast())
}


def as_selection(value: object) -> KeySelection:
    """The selection that a name, what `parameters` gave, or an object stands for.

    Raises:
        InvalidInput: none of these; an object with the name of one that ships, or with a field that JSON cannot hold.
    """
    if isinstance(value, str) and value in _SHIPPED:
        return _SHIPPED[value]
    if isinstance(value, Mapping) and value.get("name") in _SHIPPED:
        return _from_parameters(_SHIPPED[value["name"]], value)
    if isinstance(value, Mapping) or not isinstance(value, KeySelection):
        own = "is a selection of one's own: give the object itself" if isinstance(value, Mapping) else "is none"
        raise InvalidInput(f"{own}; must be {', '.join(_SHIPPED)}, or an object with `name` and `__call__`")
    parameters(value)
    return value


def parameters(selection: KeySelection) -> str | dict[str, object]:
    """What tells a selection from others, as JSON has it; two of which this is the same choose the same keys.

    A selection of this library goes by its name, and by the fields that differ from what the name stands for. Of an
    object of one's own it is the name and all its fields: of a dataclass those that are compared, else its attributes.

    Raises:
        InvalidInput: a field that JSON cannot hold; or the name is that of one that ships, which this is not.
    """
    if not isinstance(selection.name, str):
        raise InvalidInput(f"a key selection's name is {selection.name!r}: it must be a text")
    shipped = _SHIPPED.get(selection.name)
    if shipped is not None and type(selection) is not type(shipped):
        raise InvalidInput(f"{selection.name!r} is the name of a selection that ships: give yours another")
    held = _fields(selection)
    if shipped is not None:
        held = {name: value for name, value in held.items() if value != getattr(shipped, name)}
        if not held:
            return selection.name
    try:
        written: dict[str, object] = json.loads(json.dumps({**held, "name": selection.name}))
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"key selection {selection.name!r} cannot be told from others in files: {error}; make it a dataclass whose "
            "fields are numbers and texts, and mark what does not tell it from others with field(compare=False)"
        ) from error
    return written


def _fields(selection: object) -> dict[str, object]:
    if is_dataclass(selection):
        return {each.name: getattr(selection, each.name) for each in fields(selection) if each.compare}
    return dict(getattr(selection, "__dict__", {}))


def _from_parameters(shipped: HighestAttention | OMP, given: Mapping[str, object]) -> KeySelection:
    held = _fields(shipped)
    if unknown := [name for name in given if name not in held]:
        raise InvalidInput(f"{shipped.name!r} has no {', '.join(map(str, unknown))}; it has {', '.join(held)}")
    try:
        return TypeAdapter(type(shipped)).validate_python({**held, **given})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))} {each['input']!r}: {each['msg']}" for each in error.errors())
        raise InvalidInput("; ".join(problems)) from error
