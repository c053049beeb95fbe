"""Reads the header of a GGUF file and checks its vocabulary before a library loads the file.

With some damaged vocabularies llama.cpp aborts the process, and transformers raises unrelated errors. Knows neither of
the two libraries.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
NO_TOKEN = 0xFFFFFFFF
"""The id of a special token that a model does not have: -1 as an unsigned number."""
MAX_DIMENSIONS = 8


class BadHeader(ValueError):
    """The file is not a GGUF file, or its header or vocabulary is damaged."""


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file.

    Attributes:
        metadata: by key: text, a number, a numpy array, or a list of texts as bytes.
        shapes: the shape of each tensor by name.
    """

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        BadHeader: the file has no such header, or the header is cut off or damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise BadHeader("it does not begin as a GGUF file does")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _HeaderReader(data).header()
            except (struct.error, UnicodeDecodeError) as error:
                raise BadHeader(f"its header is cut off or damaged ({error})") from error


class _HeaderReader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, len(GGUF_MAGIC)

    def header(self) -> Header:
        if (version := self._number("<I")) not in VERSIONS:
            raise BadHeader(f"its version is {version}; only {VERSIONS} can be read")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text().decode()
            if key in metadata:
                raise BadHeader(f"{key} is there twice")
            metadata[key] = self._value(self._number("<I"))
        shapes: dict[str, tuple[int, ...]] = {}
        for _ in range(num_tensors):
            name, num_dimensions = self._text().decode(), self._number("<I")
            if num_dimensions > MAX_DIMENSIONS:
                raise BadHeader(f"tensor {name} has {num_dimensions} dimensions")
            shapes[name] = tuple(self._number("<Q") for _ in range(num_dimensions))
            self._position += 4 + 8  # type and offset
        return Header(metadata, shapes)

    def _number(self, kind: str) -> int:
        (number,) = struct.unpack_from(kind, self._data, self._position)
        self._position += struct.calcsize(kind)
        return int(number)

    def _text(self) -> bytes:
        size = self._number("<Q")
        return self._bytes(size)

    def _bytes(self, size: int) -> bytes:
        if size > len(self._data) - self._position:
            raise BadHeader(f"{size} bytes are announced, and {len(self._data) - self._position} follow")
        start, self._position = self._position, self._position + size
        return self._data[start : self._position]

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text().decode("utf-8", "replace")
        if kind != ARRAY:
            return self._array(kind, 1)[0].item()
        kind, size = self._number("<I"), self._number("<Q")
        if kind != STRING:
            return self._array(kind, size)
        if size > len(self._data):
            raise BadHeader(f"{size} texts are announced, more than the file has bytes")
        return [self._text() for _ in range(size)]

    def _array(self, kind: int, size: int) -> Any:
        if kind not in SCALARS:
            raise BadHeader(f"a value has the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self._bytes(size * dtype.itemsize), dtype=dtype)


def require_vocabulary(header: Header) -> None:
    """Raise BadHeader if the vocabulary lacks something that both libraries rely on."""
    metadata = header.metadata
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(kind, str) or kind in ("", "none"):
        raise BadHeader("it has no vocabulary (tokenizer.ggml.model)")
    if not isinstance(tokens, list) or not tokens:
        raise BadHeader("its vocabulary has no list of tokens (tokenizer.ggml.tokens)")
    _require_texts(tokens)
    num_tokens = len(tokens)
    rows = header.shapes.get("token_embd.weight", ())
    if len(rows) == 2 and rows[1] != num_tokens:
        raise BadHeader(f"its vocabulary has {num_tokens} tokens, and its embeddings are for {rows[1]}")
    for name, dtype in (("token_type", np.int32), ("scores", np.float32)):
        _require_for_each(name, metadata.get(f"tokenizer.ggml.{name}"), np.dtype(dtype), num_tokens)
    _require_ids(metadata, num_tokens)
    if kind == "gpt2":
        _require_merges(metadata.get("tokenizer.ggml.merges"))
    if kind == "llama":
        known = set(tokens)
        lacking = [byte for byte in range(256) if not known & {b"<0x%02X>" % byte, bytes([byte])}]
        if lacking:
            raise BadHeader(f"its vocabulary lacks tokens for {len(lacking)} bytes, such as <0x{lacking[0]:02X}>")


def _require_texts(tokens: Sequence[bytes]) -> None:
    seen: dict[bytes, int] = {}
    for index, token in enumerate(tokens):
        if token and seen.setdefault(token, index) != index:
            raise BadHeader(f"tokens {seen[token]} and {index} of its vocabulary are both {token!r}")
    try:
        b"\n".join(tokens).decode()
    except UnicodeDecodeError as error:
        raise BadHeader(f"its vocabulary is not in UTF-8 ({error})") from error


def _require_for_each(name: str, values: Any, dtype: np.dtype[Any], num_tokens: int) -> None:
    if values is None:
        return
    if not isinstance(values, np.ndarray) or values.dtype != dtype:  # llama.cpp does not check the type
        raise BadHeader(f"tokenizer.ggml.{name} is not an array of {dtype}")
    if len(values) != num_tokens:
        raise BadHeader(f"tokenizer.ggml.{name} has {len(values)} entries for {num_tokens} tokens")
    if name == "scores" and not np.isfinite(values).all():
        raise BadHeader("tokenizer.ggml.scores has entries that are not finite")


def _require_ids(metadata: dict[str, Any], num_tokens: int) -> None:
    for key, value in metadata.items():
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise BadHeader(f"{key} is {value!r}, which is not a token id")
        if value not in (NO_TOKEN, -1) and not 0 <= value < num_tokens:
            raise BadHeader(f"{key} is {value}, outside its vocabulary of {num_tokens} tokens")


def _require_merges(merges: Any) -> None:
    if not isinstance(merges, list) or not merges:
        raise BadHeader("its vocabulary of byte pairs has no list of merges (tokenizer.ggml.merges)")
    for index, merge in enumerate(merges):
        if not 0 < merge.find(b" ", 1) < len(merge) - 1:
            raise BadHeader(
                f"merge {index} of its vocabulary is {merge!r}, and must be two tokens with a space between"
            )


def require_known_merges(header: Header) -> None:
    """Raise BadHeader if a merge has a part or result that is not a token: transformers cannot read such a merge."""
    metadata = header.metadata
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    tokens = set(metadata["tokenizer.ggml.tokens"])
    for index, merge in enumerate(metadata["tokenizer.ggml.merges"]):
        space = merge.find(b" ", 1)
        first, second = merge[:space], merge[space + 1 :]
        if lacking := next((token for token in (first, second, first + second) if token not in tokens), None):
            raise BadHeader(f"merge {index} of its vocabulary is {merge!r}, and {lacking!r} is not a token of it")
