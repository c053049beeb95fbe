"""The stock llama-cpp-python package: its version, its tensors as numbers. Knows no cache and no session.

The engine reads what the package does not promise to keep: the layout of a sequence's state, and the tensors of the
graph as it is computed. So one version is pinned, and the engine tests itself at start.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor

from am_memory.errors import InvalidInput, UnsupportedModel

VERSION = "0.3.36"
INSTALL = (
    f"pip install llama-cpp-python=={VERSION}; on a CPU with AMX build it with CMAKE_ARGS="
    '"-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"'
)
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KV_TYPES = (*TORCH_TYPES, "Q8_0")
"""What keys and values may be stored as."""


@cache
def library() -> ModuleType:
    """llama_cpp, initialised and quiet.

    Raises:
        UnsupportedModel: it is not installed, or another version is.
    """
    try:
        found = importlib.metadata.version("llama-cpp-python")
        import llama_cpp
    except (ImportError, OSError) as error:
        raise UnsupportedModel(f"engine 'llama_cpp' needs llama-cpp-python {VERSION} ({error}): {INSTALL}") from error
    if found != VERSION:
        raise UnsupportedModel(
            f"llama-cpp-python is {found}, and this engine reads what only {VERSION} is known to keep: {INSTALL}"
        )
    from llama_cpp._logger import logger, set_verbose

    if logger.level == logging.NOTSET:  # nobody has asked for more
        set_verbose(False)
    module: ModuleType = llama_cpp
    module.llama_backend_init()
    return module


class GGMLTensor(ctypes.Structure):
    """`struct ggml_tensor` of the pinned version, up to what is read of it."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_byte * 64),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


Access = Callable[[int, Any, int, int], None]
"""Called with a tensor's address, one in host memory, and the offset and the number of bytes."""


@cache
def ggml() -> tuple[Access, Access, Callable[[int], int], dict[str, int]]:
    """ggml's functions to read a tensor, to write it and to know its size, and the numbers of its operations."""
    library()
    from llama_cpp._ggml import libggml

    libggml.ggml_op_name.restype = ctypes.c_char_p
    libggml.ggml_op_name.argtypes = [ctypes.c_int]
    libggml.ggml_nbytes.restype = ctypes.c_size_t
    libggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
    for access in (libggml.ggml_backend_tensor_get, libggml.ggml_backend_tensor_set):
        access.restype = None
        access.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    ops: dict[str, int] = {}
    for number in range(256):
        name = libggml.ggml_op_name(number).decode()
        ops[name] = number
        if name == "GLU":  # the last one
            break
    return libggml.ggml_backend_tensor_get, libggml.ggml_backend_tensor_set, libggml.ggml_nbytes, ops


def tensor_at(address: int) -> GGMLTensor:
    return GGMLTensor.from_address(address)


def read_tensor(address: int) -> Tensor:
    """A tensor of the graph on whatever device, as floats: (ne[2], ne[1], ne[0]); it must have three axes."""
    tensor = tensor_at(address)
    tensor_get, _, nbytes, _ = ggml()
    raw = np.empty(nbytes(address), dtype=np.uint8)
    tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    kind = GGMLQuantizationType(tensor.type)
    if kind.name not in KV_TYPES:
        raise UnsupportedModel(f"a tensor of type {kind.name} cannot be read; use {', '.join(KV_TYPES)}")
    row_bytes = row_size(kind.name, tensor.ne[0])
    rows = np.lib.stride_tricks.as_strided(
        raw, (tensor.ne[2], tensor.ne[1], row_bytes), (tensor.nb[2], tensor.nb[1], 1)
    )
    return from_rows(rows, kind.name)


def write_tensor(address: int, numbers: Tensor) -> None:
    """The inverse of `read_tensor`, for a contiguous tensor of float32."""
    data = numbers.contiguous()
    assert tensor_at(address).type == GGMLQuantizationType.F32 and data.dtype == torch.float32
    ggml()[1](address, data.data_ptr(), 0, data.nbytes)


def row_size(kind: str, width: int) -> int:
    """Bytes of a row of so many numbers."""
    return width // 32 * 34 if kind == "Q8_0" else width * TORCH_TYPES[kind].itemsize


def from_rows(rows: np.ndarray[Any, Any], kind: str) -> Tensor:
    """Rows of bytes, (..., row_bytes), as numbers in the nearest type that torch has."""
    if kind == "Q8_0":
        flat = dequantize(rows.reshape(-1, rows.shape[-1]), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(flat).view(*rows.shape[:-1], -1)
    return torch.from_numpy(rows).view(TORCH_TYPES[kind])


def to_rows(numbers: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """The inverse of `from_rows`."""
    if kind == "Q8_0":
        rows: np.ndarray[Any, Any] = quantize(numbers.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
        return rows
    return numbers.to(TORCH_TYPES[kind]).contiguous().view(torch.uint8).numpy()


def ggml_type(kind: str) -> int:
    """ggml's number of a type for keys or values.

    Raises:
        InvalidInput: none of `KV_TYPES`.
    """
    if kind.upper() not in KV_TYPES:
        raise InvalidInput(f"kv_type {kind!r} is none of {', '.join(name.lower() for name in KV_TYPES)}")
    return int(GGMLQuantizationType[kind.upper()])


def type_name(number: int) -> str:
    """The inverse of `ggml_type`."""
    return GGMLQuantizationType(number).name.lower()


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What llama.cpp logs while the body runs; its log is one for the whole process."""
    lib = library()
    lines: list[str] = []
    from llama_cpp._logger import llama_log_callback

    callback = lib.llama_log_callback(lambda level, text, _: lines.append(text.decode("utf-8", "replace")))
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        lib.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def reason(lines: list[str]) -> str:
    """Of what was logged, the last line that tells of an error."""
    told = [line.strip() for line in "".join(lines).splitlines()]
    return next((line for line in reversed(told) if "error" in line.lower()), told[-1] if told else "no reason given")
