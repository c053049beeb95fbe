"""Access to the stock llama-cpp-python package: its version, tensors and types. Knows no cache and no session.

The engine reads parts of llama.cpp that may change between versions: the layout of a sequence's state, and the tensors
of the graph while it is computed. So the layout of tensors is checked, and the engine tests itself at start.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import re
import threading
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

from am_memory.engines.llama_cpp.layout import GGMLTensor, require_layout
from am_memory.errors import InvalidInput, UnsupportedModel

VERSION = "0.3.36"
"""The version that the tests run with."""
OLDEST = "0.3.33"
"""The oldest version whose source was compared with it: what is used of it is the same."""
INSTALL = (
    f"pip install llama-cpp-python=={VERSION}; on a CPU with AMX build it with CMAKE_ARGS="
    '"-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"'
)
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KV_TYPES = (*TORCH_TYPES, "Q8_0")
"""Types in which keys and values may be stored."""


@cache
def library() -> ModuleType:
    """The module llama_cpp, initialised and quiet.

    Raises:
        UnsupportedModel: llama-cpp-python is not installed, is too old, or has other tensors.
    """
    try:
        found = importlib.metadata.version("llama-cpp-python")
        import llama_cpp
    except (ImportError, OSError) as error:
        raise UnsupportedModel(f"engine 'llama_cpp' needs llama-cpp-python {VERSION} ({error}): {INSTALL}") from error
    if _numbers(found) < _numbers(OLDEST):
        raise UnsupportedModel(f"llama-cpp-python is {found}, and this engine needs {OLDEST} or later: {INSTALL}")
    if _numbers(found) > _numbers(VERSION):
        logging.getLogger("am_memory").warning(
            "llama-cpp-python %s is newer than %s, with which the engine was tested", found, VERSION
        )
    from llama_cpp._ggml import libggml
    from llama_cpp._logger import logger, set_verbose

    require_layout(libggml, found)
    if logger.level == logging.NOTSET:  # the user has not set a level
        set_verbose(False)
    module: ModuleType = llama_cpp
    module.llama_backend_init()
    return module


def _numbers(version: str) -> list[int]:
    """A version to compare, such as [0, 3, 36]."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


Access = Callable[[int, Any, int, int], None]
"""Called with a tensor's address, an address in host memory, an offset in bytes and a number of bytes."""


@cache
def ggml() -> tuple[Access, Access, Callable[[int], int], dict[str, int]]:
    """Functions of ggml that read a tensor, write it and return its size, and ggml's operations by name."""
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
    """Read a tensor of three axes from any device: (ne[2], ne[1], ne[0])."""
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


def is_in_host_memory(address: int) -> bool:
    """Whether a tensor of the graph lies where this process can write."""
    ggml()
    from llama_cpp._ggml import libggml

    is_host = libggml.ggml_backend_buffer_is_host
    is_host.restype, is_host.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    buffer = tensor_at(address).buffer
    return buffer is not None and bool(is_host(buffer))


def write_tensor(address: int, numbers: Tensor) -> None:
    """Write a float32 tensor of the graph; the inverse of `read_tensor`."""
    data = numbers.contiguous()
    assert tensor_at(address).type == GGMLQuantizationType.F32 and data.dtype == torch.float32
    ggml()[1](address, data.data_ptr(), 0, data.nbytes)


def row_size(kind: str, width: int) -> int:
    """The bytes of a row of `width` numbers."""
    return width // 32 * 34 if kind == "Q8_0" else width * TORCH_TYPES[kind].itemsize


def from_rows(rows: np.ndarray[Any, Any], kind: str) -> Tensor:
    """Convert rows of bytes, (..., row_bytes), to numbers: Q8_0 to float32, other types to the same type of torch."""
    if kind == "Q8_0":
        flat = dequantize(rows.reshape(-1, rows.shape[-1]), GGMLQuantizationType.Q8_0)
        return torch.from_numpy(flat).view(*rows.shape[:-1], flat.shape[-1])
    return torch.from_numpy(rows).view(TORCH_TYPES[kind])


def to_rows(numbers: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Convert numbers to rows of bytes; the inverse of `from_rows`."""
    if kind == "Q8_0":
        rows: np.ndarray[Any, Any] = quantize(numbers.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
        return rows
    return numbers.to(TORCH_TYPES[kind]).contiguous().view(torch.uint8).numpy()


def ggml_type(kind: str) -> int:
    """The number that ggml gives to a type of keys or values.

    Raises:
        InvalidInput: the type is not in `KV_TYPES`.
    """
    if kind.upper() not in KV_TYPES:
        raise InvalidInput(f"kv_type {kind!r} is unknown: use {', '.join(name.lower() for name in KV_TYPES)}")
    return int(GGMLQuantizationType[kind.upper()])


def ggml_type_of(dtype: torch.dtype) -> int:
    """The number that ggml gives to a type of torch."""
    return next(ggml_type(name) for name, kind in TORCH_TYPES.items() if kind == dtype)


def type_name(number: int) -> str:
    """The name of a type by ggml's number; the inverse of `ggml_type`."""
    return GGMLQuantizationType(number).name.lower()


_log_lock, _log_takers = threading.Lock(), list[list[str]]()


@cache
def _log_collector() -> Any:
    """llama.cpp's callback for its log; it lives for ever, since any thread may log at any time."""

    def take(level: int, text: bytes, _: Any) -> None:
        for lines in _log_takers:
            lines.append(text.decode("utf-8", "replace"))

    return library().llama_log_callback(take)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect llama.cpp's log while the body runs; the whole process has one log, so that others wait."""
    lib, lines = library(), list[str]()
    from llama_cpp._logger import llama_log_callback

    with _log_lock:
        _log_takers.append(lines)
        lib.llama_log_set(_log_collector(), ctypes.c_void_p(0))
        try:
            yield lines
        finally:
            _log_takers.clear()
            lib.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def reason(lines: list[str]) -> str:
    """The last logged line with an error, else the last line."""
    logged = [line.strip() for line in "".join(lines).splitlines()]
    errors = [line for line in logged if "error" in line.lower()]
    return (errors or logged or ["no reason given"])[-1]
