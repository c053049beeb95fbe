"""The layout of ggml's tensors, as far as this project reads and changes them, and a check that it is so."""

from __future__ import annotations

import ctypes
from typing import Any

from am_memory.errors import UnsupportedModel

PADDING_BYTES = 16
"""What `struct ggml_tensor` has behind the fields of `GGMLTensor`."""
OBJECT_BYTES = 32
"""What `ggml_tensor_overhead` counts beside the struct."""
NAME = b"am_memory"


class GGMLTensor(ctypes.Structure):
    """`struct ggml_tensor`, up to the last field that is read."""

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


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def require_layout(libggml: Any, version: str) -> None:
    """Let ggml make tensors, and compare their fields with what they must be; nothing else is read or written.

    Raises:
        UnsupportedModel: a field lies elsewhere.
    """
    pointer, size, dims = ctypes.c_void_p, ctypes.c_size_t, [ctypes.c_int64] * 3

    def call(name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = getattr(libggml, name)
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))

    num_bytes = call("ggml_tensor_overhead", size) - OBJECT_BYTES
    context = call("ggml_init", pointer, (_InitParams, _InitParams(2**14, None, True)))
    try:
        sizes = zip(dims, (8, 3, 2), strict=True)
        whole = call("ggml_new_tensor_3d", pointer, (pointer, context), (ctypes.c_int, 1), *sizes)
        call("ggml_set_name", pointer, (pointer, whole), (ctypes.c_char_p, NAME))
        view = call("ggml_view_1d", pointer, (pointer, context), (pointer, whole), (ctypes.c_int64, 4), (size, 16))
        found, seen = GGMLTensor.from_address(whole), GGMLTensor.from_address(view)
        fields = {
            "the size": (num_bytes, ctypes.sizeof(GGMLTensor) + PADDING_BYTES),
            "type": (found.type, 1),
            "ne": ([*found.ne], [8, 3, 2, 1]),
            "nb": ([*found.nb], [2, 16, 48, 96]),
            "op": (found.op, 0),
            "name": (found.name, NAME),
            "src": (seen.src[0], whole),
            "view_src": (seen.view_src, whole),
            "view_offs": (seen.view_offs, 16),
            "data": (seen.data, None),
        }
        strange = [name for name, (actual, expected) in fields.items() if actual != expected]
    finally:
        call("ggml_free", None, (pointer, context))
    if strange:
        raise UnsupportedModel(
            f"llama-cpp-python {version} lays out its tensors in another way ({', '.join(strange)}): use an older one"
        )
