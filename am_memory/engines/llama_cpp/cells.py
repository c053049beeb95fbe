"""The content of a llama.cpp cache: cells that all layers and KV heads share. It is immutable and knows no policy.

    [pinned exact][segment 1]...[segment n][exact tail]      the cells of one sequence, in this order

A cell is a slot of every head of every layer at once: a segment of n cells gives n slots to each head. llama.cpp has no
place for biases, so they are folded into the keys.
The cells of a segment stand in the order of their rank, so that cutting a segment drops its last cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from am_memory.engines.llama_cpp.decoder import CellSequence
from am_memory.engines.llama_cpp.model import CellModel, LayerShape
from am_memory.engines.llama_cpp.state import SequenceState
from am_memory.kv_cache.int8 import Rows, decoded
from am_memory.kv_cache.layers import LayerState, SlidingState, TailBuffer, TailState
from am_memory.kv_cache.slots import PINNED_RANK, Segment, Slots, tail_start


@dataclass(frozen=True)
class CacheContent:
    """The content of a cache at one moment; the cells themselves are in `sequence`.

    Attributes:
        sequence: the cells; it may have later ones, too.
        num_tokens: logical length.
        segments: the compacted tokens.
        num_pinned_slots: cells of pinned tokens before the segments; 0 before the first compaction.
    """

    model: CellModel = field(repr=False)
    sequence: CellSequence = field(repr=False)
    num_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    num_pinned_slots: int = 0

    @property
    def tail_start(self) -> int:
        return tail_start(self.segments)

    @property
    def num_tail_tokens(self) -> int:
        return self.num_tokens - self.tail_start

    @property
    def segment_cells(self) -> list[int]:
        """The number of cells of each segment."""
        return [num_cells(segment, self.model.num_heads) for segment in self.segments]

    @property
    def base_cells(self) -> int:
        """Cells before the tail."""
        return self.num_pinned_slots + sum(self.segment_cells)

    @property
    def num_cells(self) -> int:
        return self.base_cells + self.num_tail_tokens

    @property
    def num_window_cells(self) -> int:
        """Cells of sliding-window layers: what a token may attend to after a rewind to the start of the tail."""
        if not self.model.windows:
            return 0
        return min(self.num_tokens, self.num_tail_tokens + self.model.window_tokens)

    @property
    def window_bytes(self) -> int:
        return self.num_window_cells * self.model.window_cell_bytes

    @property
    def nbytes(self) -> int:
        return self.num_cells * self.model.cell_bytes + self.window_bytes

    @cached_property
    def cells(self) -> SequenceState:
        """All cells, copied out of llama.cpp once."""
        return self.model.decoder.take(self.sequence, self.num_tokens)

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """The cache as tensors for saving, sliding windows last; biases are folded into the keys."""
        if self.num_tokens == 0:
            nothing = TailState(None, None, 0, 0), SlidingState(None, None, 0)
            return (nothing[0],) * len(self.model.layers) + (nothing[1],) * len(self.model.windows)
        windows = self.cells.window
        return (
            *(CellLayer(self, index).state() for index in range(len(self.model.layers))),
            *(_window_state(windows, index, shape, self.num_tokens) for index, shape in enumerate(self.model.windows)),
        )


@dataclass(frozen=True)
class CellLayer:
    """One layer of a cache, read-only; see `am_memory.engines.base.SessionLayer`."""

    content: CacheContent
    index: int
    sinks = softcap = None

    @property
    def start(self) -> int:
        return self.content.tail_start

    @property
    def scaling(self) -> float:
        return self.shape.scaling

    @property
    def query_rotations(self) -> Tensor:
        return self.shape.rotation.later

    @property
    def shape(self) -> LayerShape:
        return self.content.model.layers[self.index]

    def _entries(self, where: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of some cells: (num_heads, num_cells, head_dim) each."""
        cells = self.content.cells
        key, value = (column.take(where) for column in (cells.keys[self.index], cells.values[self.index]))
        return key.tensor(self.shape.num_heads), value.tensor(self.shape.num_heads)

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Exact keys and values at the logical positions [start, end): (num_heads, end - start, head_dim) each."""
        content = self.content
        assert content.tail_start <= start <= end <= content.num_tokens
        first = content.base_cells - content.tail_start
        return self._entries(slice(first + start, first + end))

    def rotated(self, key: Tensor, distance: int | Tensor) -> Tensor:
        """Keys rotated to later positions; see `am_memory.engines.base.SessionLayer.rotated`."""
        if isinstance(distance, Tensor):
            return self.shape.rotation.rotated(key, distance)
        return key @ self.shape.rotation.by(distance).mT.to(key.dtype) if distance else key

    @property
    def slots(self) -> Slots | None:
        content = self.content
        if not content.segments:
            return None
        num_heads, num_slots = self.shape.num_heads, content.base_cells
        key, value = self._entries(slice(0, num_slots))
        positions = torch.tensor(base_positions(content.segments, content.segment_cells, content.num_pinned_slots))
        ranks = [PINNED_RANK] * content.num_pinned_slots
        for count in content.segment_cells:
            ranks += [cell_rank(index, content.model.num_heads) for index in range(count)]
        return Slots(
            key=key.reshape(-1, self.shape.head_dim),
            value=value.reshape(-1, self.shape.head_dim),
            bias=key.new_zeros(num_heads * num_slots),
            positions=positions.int().repeat(num_heads),
            ranks=torch.tensor(ranks, dtype=torch.int32).repeat(num_heads),
            cu_slots=tuple(index * num_slots for index in range(num_heads + 1)),
        )

    def state(self) -> TailState:
        key, value = self.exact_entries(self.start, self.content.num_tokens)
        return TailState(self.slots, TailBuffer(key[None], value[None]), self.start, key.shape[1])


def num_cells(segment: Segment, num_heads: int) -> int:
    """Cells of a segment; a cell has one slot of each head."""
    return segment.num_slots // num_heads


def cell_rank(index: int, num_heads: int) -> int:
    """The rank of all slots in a segment's cell: that of the last head's slot, since a cell needs all of them."""
    return (index + 1) * num_heads - 1


def base_positions(segments: Sequence[Segment], counts: Sequence[int], num_pinned: int) -> list[int]:
    """The positions of the cells before the tail.

    Every later token attends to all of them, so any ascending positions before the tail will do. llama.cpp requires
    that the last one is directly before the next token's position.
    """
    positions = list(range(num_pinned))
    for segment, count in zip(segments, counts, strict=True):
        positions += range(segment.start, segment.start + count)
        if count:
            positions[-1] = segment.end - 1
    return positions


def packed(
    model: CellModel,
    cells: SequenceState,
    segments: tuple[Segment, ...],
    counts: Sequence[int],
    num_pinned: int,
    num_tokens: int,
) -> CacheContent:
    """A cache of these cells, which are moved to their positions."""
    tail = range(tail_start(segments), num_tokens)
    placed = cells.at([*base_positions(segments, counts, num_pinned), *tail])
    return CacheContent(model, CellSequence(placed.pack()), num_tokens, segments, num_pinned)


def heads_of(rows: Rows, slots: Slots) -> Tensor:
    """The rows of slots by head: (num_heads, slots of a head, head_dim)."""
    entries = decoded(rows)
    return entries.view(slots.num_heads, -1, entries.shape[-1])


def _window_state(cells: SequenceState | None, index: int, shape: LayerShape, num_tokens: int) -> SlidingState:
    assert cells is not None
    key, value = (column[index].tensor(shape.num_heads)[None] for column in (cells.keys, cells.values))
    return SlidingState(key, value, num_tokens)
