"""Names by which users choose an engine and a dtype. Loads no engine and no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from am_memory.errors import InvalidInput

if TYPE_CHECKING:
    import torch

EngineName = Literal["transformers", "llama_cpp"]
"""An engine of this library; a memory takes any other `Engine`, too."""

DtypeName = Literal["float32", "bfloat16", "float16"]
"""A dtype on the command line and in a configuration."""


def require_engine_name(engine: object) -> None:
    """Check the name of an engine.

    Raises:
        InvalidInput: no engine of this library has this name.
    """
    if engine not in get_args(EngineName):
        raise InvalidInput(f"engine {engine!r} is none of {', '.join(get_args(EngineName))}: give one of them")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of this name; a dtype, and None, stay as they are.

    Raises:
        InvalidInput: no dtype has this name.
    """
    if not isinstance(dtype, str):
        return dtype
    if dtype not in get_args(DtypeName):
        raise InvalidInput(f"dtype {dtype!r} is none of {', '.join(get_args(DtypeName))}: give one of them")
    import torch

    named: torch.dtype = getattr(torch, dtype)
    return named
