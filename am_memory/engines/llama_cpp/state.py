"""The state of one llama.cpp sequence, as bytes and as rows of keys and values. Knows no model and no compaction.

The layout is what llama_state_seq_get_data of the pinned version writes, little-endian:

    u32 magic, i32 sequence
    u32 number of streams, u32 number of cells
    for each cell: i32 position, u32 1, i32 sequence
    u32 whether values are transposed, u32 number of layers
    for each layer: i32 type, u64 bytes of a row, the keys as a row for each cell
    for each layer, if not transposed: the values in the same way
    for each layer, if transposed: i32 type, u32 bytes of an element, u32 width, a row of all cells for each element

A model with sliding windows has all but the first line twice: for its other layers, then for the layers with a window.
The state has no version number, so the engine tests itself at start.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from am_memory.engines.llama_cpp.library import from_rows, to_rows
from am_memory.errors import UnsupportedModel

STATE_MAGIC = 0xAF143CD8
WHOLE = -1
"""Saves the whole context, which holds one sequence. Saving the sequence by its number would drop window cells that the
next token cannot see, and rewinding would be impossible."""
CellRows = np.ndarray[Any, np.dtype[np.uint8]]
"""(num_cells, row_bytes): for each cell, all heads of a layer, one after the other."""
Blob = np.ndarray[Any, np.dtype[np.uint8]]
"""A whole state as bytes; never changed in place."""


@dataclass(frozen=True)
class Column:
    """The keys or values of one layer.

    Attributes:
        kind: name of the type, such as "F16".
        rows: the bytes of each cell.
    """

    kind: str
    rows: CellRows

    def tensor(self, num_heads: int) -> Tensor:
        """The numbers, (num_heads, num_cells, head_dim); a view of the rows if torch has the type."""
        numbers = from_rows(self.rows, self.kind)
        return numbers.view(len(self.rows), num_heads, numbers.shape[1] // num_heads).transpose(0, 1)

    def like(self, numbers: Tensor) -> Column:
        """Make a column of this type from numbers, (num_heads, num_cells, head_dim)."""
        cells = numbers.transpose(0, 1).flatten(1)
        return Column(self.kind, to_rows(cells, self.kind).reshape(len(cells), self.rows.shape[1]))

    def take(self, where: slice) -> Column:
        return Column(self.kind, self.rows[where])

    @classmethod
    def join(cls, parts: Sequence[Column]) -> Column:
        return cls(parts[0].kind, np.concatenate([part.rows for part in parts]))


@dataclass(frozen=True)
class SequenceState:
    """The cells of a sequence.

    Attributes:
        positions: (num_cells,) int32, ascending.
        keys, values: a column for each layer.
        is_transposed: whether llama.cpp stores the values transposed.
        window: the cells of the layers with a sliding window; None if there are no such layers.
    """

    positions: np.ndarray[Any, np.dtype[np.int32]]
    keys: tuple[Column, ...]
    values: tuple[Column, ...]
    is_transposed: bool
    window: SequenceState | None = None

    @property
    def num_cells(self) -> int:
        return len(self.positions)

    def take(self, where: slice) -> SequenceState:
        """Some of the cells, without the cells of windows."""
        return SequenceState(
            self.positions[where],
            tuple(column.take(where) for column in self.keys),
            tuple(column.take(where) for column in self.values),
            self.is_transposed,
        )

    def between(self, start: int, end: int) -> SequenceState:
        """The cells at positions from `start` to before `end`; the cells must be sorted."""
        return self.take(slice(*np.searchsorted(self.positions, (start, end)).tolist()))

    def before(self, num_tokens: int) -> SequenceState:
        """The cells of the first tokens, with the cells of windows."""
        window = None if self.window is None else self.window.between(0, num_tokens)
        return replace(self.between(0, num_tokens), window=window)

    @classmethod
    def join(cls, parts: Sequence[SequenceState]) -> SequenceState:
        """Concatenate the cells of several states, without the cells of windows."""
        return cls(
            np.concatenate([part.positions for part in parts]),
            tuple(map(Column.join, zip(*(part.keys for part in parts), strict=True))),
            tuple(map(Column.join, zip(*(part.values for part in parts), strict=True))),
            parts[0].is_transposed,
        )

    def at(self, positions: Sequence[int]) -> SequenceState:
        """The same cells at other positions."""
        return replace(self, positions=np.asarray(positions, dtype=np.int32))

    def sorted(self) -> SequenceState:
        """Sort the cells by position; llama.cpp does not write a context that had gaps in order."""
        if self.window is not None:
            return replace(replace(self, window=None).sorted(), window=self.window.sorted())
        if bool((np.diff(self.positions) > 0).all()):
            return self
        order = np.argsort(self.positions, kind="stable")
        keys, values = (
            tuple(Column(column.kind, column.rows[order]) for column in columns) for columns in (self.keys, self.values)
        )
        return SequenceState(self.positions[order], keys, values, self.is_transposed)

    def pack(self) -> Blob:
        """The state as the bytes that llama.cpp reads."""
        parts = [struct.pack("<Ii", STATE_MAGIC, WHOLE), *self._packed()]
        if self.window is not None:
            parts += self.window._packed()
        return np.frombuffer(bytearray().join(parts), dtype=np.uint8)

    def _packed(self) -> list[bytes]:
        meta = np.empty((self.num_cells, 3), dtype="<i4")
        meta[:, 0], meta[:, 1], meta[:, 2] = self.positions, 1, 0
        parts = [
            struct.pack("<II", 1, self.num_cells),
            meta.tobytes(),
            struct.pack("<II", self.is_transposed, len(self.keys)),
        ]
        for column in self.keys:
            parts += [
                struct.pack("<iQ", GGMLQuantizationType[column.kind], column.rows.shape[1]),
                column.rows.tobytes(),
            ]
        for column in self.values:
            number = GGMLQuantizationType[column.kind]
            if self.is_transposed:
                size = from_rows(column.rows[:0], column.kind).element_size()
                elements = column.rows.reshape(self.num_cells, -1, size)
                header = struct.pack("<iII", number, size, elements.shape[1])
                parts += [header, np.ascontiguousarray(elements.transpose(1, 0, 2)).tobytes()]
            else:
                parts += [struct.pack("<iQ", number, column.rows.shape[1]), column.rows.tobytes()]
        return parts

    @classmethod
    def parse(cls, data: Blob) -> SequenceState:
        """Read the bytes that llama.cpp wrote; the rows are views of them.

        Raises:
            UnsupportedModel: the layout is not that of ordinary keys and values in one stream.
        """
        reader = _StateReader(data)
        magic, _ = reader.unpack("<Ii")
        if magic != STATE_MAGIC:
            raise UnsupportedModel(f"a state with magic {magic:#x} cannot be read")
        state = cls._parsed(reader)
        if reader.left:
            state = replace(state, window=cls._parsed(reader))
        if reader.left:
            raise UnsupportedModel(f"a state with {reader.left} bytes behind its values has more than two caches in it")
        return state

    @classmethod
    def _parsed(cls, reader: _StateReader) -> SequenceState:
        num_streams, num_cells = reader.unpack("<II")
        if num_streams != 1:
            raise UnsupportedModel(f"a state with {num_streams} streams cannot be read")
        meta = np.frombuffer(reader.take(12 * num_cells), dtype="<i4").reshape(-1, 3)
        if num_cells == 0 or not bool((meta[:, 1] == 1).all()):
            raise UnsupportedModel(f"a state with {num_cells} cells of other than one sequence cannot be read")
        is_transposed, num_layers = reader.unpack("<II")
        keys = tuple(reader.column(num_cells) for _ in range(num_layers))
        read_value = reader.transposed_column if is_transposed else reader.column
        values = tuple(read_value(num_cells) for _ in range(num_layers))
        return cls(meta[:, 0].astype(np.int32), keys, values, bool(is_transposed))


class _StateReader:
    def __init__(self, data: Blob) -> None:
        self._data = memoryview(data.data)
        self._offset = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._offset

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise UnsupportedModel(f"a state ends {size - self.left} bytes too early: it has another layout")
        start, self._offset = self._offset, self._offset + size
        return self._data[start : self._offset]

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def column(self, num_cells: int) -> Column:
        number, row_bytes = self.unpack("<iQ")
        rows = np.frombuffer(self.take(row_bytes * num_cells), dtype=np.uint8).reshape(num_cells, row_bytes)
        return Column(_kind(number), rows)

    def transposed_column(self, num_cells: int) -> Column:
        number, size, width = self.unpack("<iII")
        elements = np.frombuffer(self.take(size * width * num_cells), dtype=np.uint8).reshape(width, num_cells, size)
        return Column(_kind(number), np.ascontiguousarray(elements.transpose(1, 0, 2)).reshape(num_cells, -1))


def _kind(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError as error:
        raise UnsupportedModel(f"a state with numbers of type {number} cannot be read: {error}") from error
