"""A file of tensors with a format and a checksum of itself: one safetensors file. Knows nothing of what it holds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import safetensors.torch
from torch import Tensor

from am_memory.errors import NewerFormat, OlderFormat
from am_memory.storage.session_layers import require

FORMAT, NEEDS = 3, "0.1.0"
"""The format of a file, and the first version of this project that reads it. The metadata keep their form forever."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
MAX_AXES, MAX_EMPTY_SIZE = 4, 2**24
CHECKSUM_KEY, ZEROS = b'"sha256":"', b"0" * 64
"""The checksum is computed over the whole file, with zeros in the place of the checksum itself."""


def pack_file(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a file with a format and a checksum."""
    on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(on_host, {"format": str(FORMAT), "needs": NEEDS, "sha256": ZEROS.decode()})
    return data.replace(ZEROS, sha256(data).hexdigest().encode(), 1)


def version_of(head: bytes) -> str:
    """The checksum in the first bytes of a saved file, which identifies its version; "" if it is no such file."""
    start = head.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    version = head[start : start + len(ZEROS)]
    return version.decode() if start >= len(CHECKSUM_KEY) and re.fullmatch(rb"[0-9a-f]{64}", version) else ""


def unpack_file(data: bytes) -> dict[str, Tensor]:
    """The inverse of `pack_file`, with the checks that `unpacked` and `unpacked_text` promise."""
    header = _verified_header(data)
    metadata = header.pop("__metadata__")
    if int(metadata["format"]) > FORMAT:
        raise NewerFormat(
            f"format {metadata['format']}, and this version reads up to {FORMAT}: upgrade attention-matching-memory to "
            f"{metadata['needs']} or newer"
        )
    if int(metadata["format"]) < FORMAT:
        raise OlderFormat(
            f"format {metadata['format']}, and this version reads format {FORMAT} only: open it with the version that "
            "saved it, or delete it and give the conversation to a new session"
        )
    for name, entry in header.items():
        _require_room(name, entry)
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _verified_header(data: bytes) -> dict[str, Any]:
    start = data.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    end = start + len(ZEROS)
    digest = sha256(data[:start] + ZEROS)
    digest.update(memoryview(data)[end:])
    is_whole = data[start:end] == digest.hexdigest().encode()
    require(is_whole, "its checksum does not match: it was cut off or altered")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    require(
        isinstance(header, dict) and isinstance(header["__metadata__"], dict), "its header is not a safetensors header"
    )
    return dict(header)


def _require_room(name: str, entry: Any) -> None:
    """Raise ValueError unless a tensor takes exactly the bytes that its shape and dtype need."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    is_shape = len(shape) <= MAX_AXES and all(type(size) is int and size >= 0 for size in shape)
    require(
        is_shape and math.prod(shape) * ITEM_BYTES[entry["dtype"]] == end - begin,
        f"the bytes of {name} do not fit its shape",
    )
    require(0 not in shape or max(shape) <= MAX_EMPTY_SIZE, f"{name} is empty, but its shape is too large")
