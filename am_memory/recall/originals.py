"""Originals: the exact keys and values of compacted tokens, kept off the device, in host memory or on disk.

Owns their file format. Forks share originals; their `OriginalStore` moves and drops them. Knows no policy and no
session.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Literal, NamedTuple, Protocol, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from am_memory.errors import OriginalLost
from am_memory.recall.original_files import FilePart

Place = Literal["host", "disk"]

KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of one layer: (num_key_value_heads, num_tokens, head_dim)."""

Kinds = tuple[tuple[object, ...], ...]
"""Dtypes and shapes of each layer's keys and values, except for the number of tokens."""

T = TypeVar("T")
_uses = itertools.count()


class Entries(Protocol):
    """Keys and values of each layer, where they are kept. Immutable."""

    @property
    def place(self) -> Literal["host", "disk", "store"]:
        """Where they are; "store": with a saved session."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that they take on the host or on disk."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of `packed`."""
        ...

    def layers(self) -> Sequence[KeysAndValues]:
        """Keys and values in host memory; raises OriginalLost as `packed` does."""
        ...

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The keys of some (layer, KV head), (num_tokens, head_dim) each, not compared with any digest.

        Raises:
            OriginalLost: they cannot be read.
        """
        ...

    def packed(self) -> bytes:
        """The bytes of one safetensors file.

        Raises:
            OriginalLost: they cannot be read, or differ from what was kept.
        """
        ...


class Backup(Entries, Protocol):
    """`Entries` in a local folder of saved sessions."""

    @property
    def is_there(self) -> bool:
        """Whether nobody has deleted them."""
        ...


@dataclass(frozen=True, eq=False)
class HostEntries:
    """`Entries` in host memory."""

    entries: tuple[KeysAndValues, ...]
    place: Place = "host"

    @classmethod
    def copied(cls, entries: Iterable[KeysAndValues]) -> HostEntries:
        """Copy entries to host memory, even from a CPU: they are views of a tail that changes later."""
        return cls(tuple((_to_host(key), _to_host(value)) for key, value in entries))

    @cached_property
    def nbytes(self) -> int:
        return num_bytes(self.entries)

    @cached_property
    def digest(self) -> str:
        return sha256(self.packed()).hexdigest()

    def layers(self) -> Sequence[KeysAndValues]:
        return self.entries

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
        return keys_of(self.entries, heads)

    def packed(self) -> bytes:
        return packed(self.entries)


@dataclass(frozen=True, eq=False)
class DiskEntries:
    """`Entries` on disk. Every read compares their digest."""

    digest: str
    part: FilePart
    place: Place = "disk"

    @classmethod
    def written(cls, data: bytes) -> DiskEntries:
        """Write packed entries to the folder for temporary files; raises OSError if that fails."""
        return cls(sha256(data).hexdigest(), FilePart(data))

    @property
    def nbytes(self) -> int:
        return self.part.nbytes

    def layers(self) -> Sequence[KeysAndValues]:
        return unpacked(self.packed())

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
        return keys_of(self.layers(), heads)

    def packed(self) -> bytes:
        try:
            data = self.part.read()
        except OSError as error:
            raise OriginalLost(str(error)) from error
        if sha256(data).hexdigest() != self.digest:
            raise OriginalLost(f"they were altered on the disk, in {tempfile.gettempdir()!r}")
        return data


class Loss(NamedTuple):
    """Why an original has no entries any more; `is_dropped`: its store had no room for them."""

    reason: str
    is_dropped: bool = False


class Original:
    """The exact entries of the logical tokens [start, end), in every compactable layer.

    Threads may read it while its store moves or drops it.

    Attributes:
        start, end: the tokens.
        last_use: a number that grows with each use of any original. To make one is a use, and to read its layers.
        backup: the same entries, as they are saved; None: they are not.
    """

    def __init__(self, start: int, end: int, held: Entries | Loss) -> None:
        self.start, self.end, self.last_use = start, end, next(_uses)
        self.backup: Backup | None = None
        self._held, self._digest = held, ""

    def __repr__(self) -> str:
        return f"Original({self.start}, {self.end}, {self.lost or self.place!r})"

    @property
    def place(self) -> Literal["host", "disk", "store"] | None:
        """Where the entries are; None: they are lost."""
        held = self._held
        return None if isinstance(held, Loss) else held.place

    @property
    def lost(self) -> str | None:
        """Why the entries cannot be read; None: reading has not failed so far."""
        held = self._held
        return held.reason if isinstance(held, Loss) else None

    @property
    def is_dropped(self) -> bool:
        """Whether they are lost because there was no room for them."""
        held = self._held
        return isinstance(held, Loss) and held.is_dropped

    @property
    def nbytes(self) -> int:
        """Bytes that the entries take in host memory or on disk; 0 in a store, and once they are lost."""
        held = self._held
        return 0 if isinstance(held, Loss) else held.nbytes

    @property
    def digest(self) -> str:
        """SHA-256 of `packed`: the same in every place, and once they are lost; "" if they were never kept."""
        held = self._held
        return self._digest if isinstance(held, Loss) else held.digest

    def layers(self, start: int | None = None, end: int | None = None) -> list[KeysAndValues]:
        """Keys and values of each layer, in host memory.

        Args:
            start, end: logical tokens within the original's; None: from its first, to its last.

        Raises:
            OriginalLost: they cannot be read, or differ from what was kept.
        """
        self.last_use = next(_uses)
        first = 0 if start is None else start - self.start
        last = self.end - self.start if end is None else end - self.start
        return cut(self._read(lambda entries: entries.layers()), first, last)

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The keys of some (layer, KV head), for a search: (num_tokens, head_dim) each.

        Those in a store are not compared with their digest, which would read all entries; `layers` compares.

        Raises:
            OriginalLost: they cannot be read.
        """
        self.last_use = next(_uses)
        return self._read(lambda entries: entries.keys(heads))

    def packed(self) -> bytes:
        """The bytes of one safetensors file; raises OriginalLost as `layers` does."""
        return self._read(lambda entries: entries.packed())

    def _read(self, read: Callable[[Entries], T]) -> T:
        while not isinstance(held := self._held, Loss):
            try:
                return read(held)
            except OriginalLost as error:
                others = self.backup if self.backup is not held else None
                self.replace(others or Loss(str(error)))
        raise OriginalLost(
            f"the original entries of tokens {self.start} to {self.end} cannot be read: {held.reason}; what is compact "
            "stays as it is"
        )

    def replace(self, held: Entries | Loss) -> None:
        """Hold the same entries in another place, or none any more."""
        if isinstance(held, Loss):
            self._digest = self.digest
        self._held = held


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def num_bytes(entries: Iterable[KeysAndValues]) -> int:
    """Bytes that some entries take in memory."""
    return sum(key.nbytes + value.nbytes for key, value in entries)


def keys_of(entries: Sequence[KeysAndValues], heads: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Copies of the keys of some (layer, KV head)."""
    return [entries[layer][0][head].clone() for layer, head in heads]


def cut(entries: Iterable[KeysAndValues], start: int, end: int) -> list[KeysAndValues]:
    """The entries from index `start` to `end` of each layer, as views."""
    return [(key[:, start:end], value[:, start:end]) for key, value in entries]


def kinds_of(entries: Iterable[KeysAndValues]) -> Kinds:
    """What all entries of the same layers have in common."""
    return tuple(_kind(tensor) for layer in entries for tensor in layer)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.ndim, *(size for axis, size in enumerate(tensor.shape) if axis != 1)


def packed(entries: Iterable[KeysAndValues]) -> bytes:
    """Keys and values of each layer as the bytes of one safetensors file."""
    tensors = {}
    for index, (key, value) in enumerate(entries):
        tensors[f"{index}.key"], tensors[f"{index}.value"] = key.cpu().contiguous(), value.cpu().contiguous()
    return safetensors.torch.save(tensors)


def unpacked(data: bytes) -> list[KeysAndValues]:
    """The inverse of `packed`; raises OriginalLost for other bytes."""
    try:
        tensors = safetensors.torch.load(data)
        return [(tensors[f"{index}.key"], tensors[f"{index}.value"]) for index in range(len(tensors) // 2)]
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise OriginalLost(f"what should be original entries is something else: {error}") from error


def kept_spans(originals: Sequence[Original]) -> list[tuple[int, int]]:
    """The tokens [start, end) that have originals, as far as is known without reading them, in long spans.

    Args:
        originals: in the order of their tokens; no two hold the same token.
    """
    spans: list[tuple[int, int]] = []
    for original in originals:
        if original.lost is None:
            start = spans.pop()[0] if spans and spans[-1][1] == original.start else original.start
            spans.append((start, original.end))
    return spans


def are_kept(originals: Sequence[Original], start: int, end: int) -> bool:
    """Whether originals hold all of the tokens [start, end); see `kept_spans`."""
    return any(first <= start and end <= last for first, last in kept_spans(originals))


def between(originals: Sequence[Original], start: int, end: int) -> list[KeysAndValues] | None:
    """The entries of the tokens [start, end); None unless consecutive originals hold all of these.

    Args:
        originals: in the order of their tokens; no two hold the same token.

    Raises:
        OriginalLost: one of these originals turned out to be lost.
    """
    if not are_kept(originals, start, end):
        return None
    parts = [original for original in originals if original.start < end and original.end > start]
    spans = [(max(part.start, start), min(part.end, end)) for part in parts]
    layers = zip(*(part.layers(*span) for part, span in zip(parts, spans, strict=True)), strict=True)
    return [
        (torch.cat([key for key, _ in pieces], dim=1), torch.cat([value for _, value in pieces], dim=1))
        for pieces in layers
    ]
