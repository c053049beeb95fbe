"""Originals: the exact keys and values of compacted tokens, kept off the device, in host memory or on disk.

Owns their file format. Originals are immutable, so that forks share them. Knows no policy and no session.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, Protocol

import safetensors.torch
import torch
from torch import Tensor

from am_memory.errors import OriginalLost, StorageError
from am_memory.recall.original_files import Spill, spill

Place = Literal["host", "disk"]

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer: (num_key_value_heads, num_tokens, head_dim)."""


class Original(Protocol):
    """The exact entries of the logical tokens [start, end), in every compactable layer."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes that they take in host memory or on disk."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of `packed`, taken when they were kept."""
        ...

    @property
    def lost(self) -> str | None:
        """Why reading them failed; None: it has not failed so far."""
        ...

    def layers(self, start: int | None = None, end: int | None = None) -> list[KeysAndValues]:
        """Keys and values of each layer, in host memory.

        Args:
            start, end: logical tokens within the original's; None: from its first, to its last.

        Raises:
            OriginalLost: they cannot be read, or differ from what was kept.
        """
        ...

    def packed(self) -> bytes:
        """The bytes of one safetensors file; raises OriginalLost as `layers` does."""
        ...


@dataclass(frozen=True, eq=False)
class HostOriginal:
    """An `Original` in host memory."""

    start: int
    end: int
    entries: tuple[KeysAndValues, ...]
    lost: None = None

    @property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in self.entries)

    @cached_property
    def digest(self) -> str:
        return sha256(self.packed()).hexdigest()

    def layers(self, start: int | None = None, end: int | None = None) -> list[KeysAndValues]:
        return _cut(self, self.entries, start, end)

    def packed(self) -> bytes:
        return _packed(self.entries)


@dataclass(eq=False)
class FileOriginal:
    """An `Original` on disk. Every read compares its digest; its place in the file is freed with the object."""

    start: int
    end: int
    digest: str
    nbytes: int
    file: Spill
    offset: int
    lost: str | None = None

    @classmethod
    def write(cls, start: int, end: int, data: bytes) -> FileOriginal:
        """Write packed entries into the folder for temporary files.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            file = spill()
            offset = file.write(data)
        except OSError as error:
            raise StorageError(
                f"cannot write {len(data)} bytes of original entries to {tempfile.gettempdir()!r}: {error}; set TMPDIR "
                "to a folder with room, or originals to 'host' or 'drop'"
            ) from error
        original = cls(start, end, sha256(data).hexdigest(), len(data), file, offset)
        weakref.finalize(original, file.free, offset, len(data)).atexit = False  # the file ends with the process
        return original

    def layers(self, start: int | None = None, end: int | None = None) -> list[KeysAndValues]:
        return _cut(self, unpacked(self.packed()), start, end)

    def packed(self) -> bytes:
        try:
            data = self.file.read(self.offset, self.nbytes)
        except OSError as error:
            raise self._lose(str(error)) from error
        if sha256(data).hexdigest() != self.digest:
            raise self._lose(f"they were altered on the disk, in {tempfile.gettempdir()!r}")
        return data

    def _lose(self, reason: str) -> OriginalLost:
        self.lost = reason
        return OriginalLost(
            f"the original entries of tokens {self.start} to {self.end} cannot be read: {reason}; what is compact "
            "stays as it is"
        )


def keep(start: int, end: int, entries: Iterable[KeysAndValues], place: Place) -> Original:
    """Copy exact entries to host memory or disk; raises StorageError if they cannot be written."""
    if place == "disk":
        return FileOriginal.write(start, end, _packed(entries))
    # Copied even from a CPU: the entries are views of a tail that changes later.
    return HostOriginal(start, end, tuple((_to_host(key), _to_host(value)) for key, value in entries))


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def received(start: int, end: int, data: bytes, like: Sequence[KeysAndValues], place: Place) -> Original:
    """An original from the bytes of `Original.packed`.

    Args:
        like: any entries of the same layers, to compare shapes and dtypes with.

    Raises:
        OriginalLost: the bytes are not those of these tokens in these layers.
        StorageError: they cannot be written.
    """
    entries = unpacked(data)
    kinds = [[_kind(tensor) for tensor in layer] for layer in entries]
    if kinds != [[_kind(tensor) for tensor in layer] for layer in like] or any(
        tensor.shape[1] != end - start for layer in entries for tensor in layer
    ):
        raise OriginalLost(f"they are not the entries of {end - start} tokens in these layers")
    return FileOriginal.write(start, end, data) if place == "disk" else HostOriginal(start, end, tuple(entries))


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """Dtype and shape of a layer's keys or values, except for the number of tokens."""
    return tensor.dtype, tensor.ndim, *(size for axis, size in enumerate(tensor.shape) if axis != 1)


def _packed(entries: Iterable[KeysAndValues]) -> bytes:
    tensors = {}
    for index, (key, value) in enumerate(entries):
        tensors[f"{index}.key"], tensors[f"{index}.value"] = key.cpu().contiguous(), value.cpu().contiguous()
    return safetensors.torch.save(tensors)


def unpacked(data: bytes) -> list[KeysAndValues]:
    """Keys and values of each layer from the bytes of `Original.packed`; raises OriginalLost for other bytes."""
    try:
        tensors = safetensors.torch.load(data)
        return [(tensors[f"{index}.key"], tensors[f"{index}.value"]) for index in range(len(tensors) // 2)]
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise OriginalLost(f"what should be original entries is something else: {error}") from error


def _cut(
    original: Original, entries: Iterable[KeysAndValues], start: int | None, end: int | None
) -> list[KeysAndValues]:
    """The entries of an original's tokens [start, end), as views."""
    first = 0 if start is None else start - original.start
    last = original.end - original.start if end is None else end - original.start
    return [(key[:, first:last], value[:, first:last]) for key, value in entries]


def between(originals: Sequence[Original], start: int, end: int) -> list[KeysAndValues] | None:
    """The entries of the tokens [start, end); None unless consecutive originals hold all of these.

    Args:
        originals: in the order of their tokens; no two hold the same token.

    Raises:
        OriginalLost: one of these originals turned out to be lost.
    """
    parts = [original for original in originals if original.start < end and original.end > start and not original.lost]
    spans = [(max(part.start, start), min(part.end, end)) for part in parts]
    edges = [start, *itertools.chain.from_iterable(spans), end]
    if any(one != other for one, other in zip(edges[::2], edges[1::2], strict=True)):
        return None
    layers = zip(*(part.layers(*span) for part, span in zip(parts, spans, strict=True)), strict=True)
    return [
        (torch.cat([key for key, _ in pieces], dim=1), torch.cat([value for _, value in pieces], dim=1))
        for pieces in layers
    ]
