"""The cache of one session in llama.cpp: cells that all layers and KV heads share. Knows no policy and no solver.

    [pinned exact][segment 1]...[segment n][exact tail]      the cells of one sequence, in this order

A cell is a slot of every head of every layer at once, so a segment of n cells gives n slots to each head: where the
other cache is ragged, this one cannot be. It has no place for biases either: they come folded into the keys,
or are kept beside the cells and added to the scores as these are computed. The cells of a segment stand in the order of
their rank, so that cutting a segment drops its last cells.

As with the other cache, a snapshot is a handful of references: what has been read once stays, until something is read
in its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from am_memory.engines.llama_cpp.capture import OnAttention
from am_memory.engines.llama_cpp.decoder import CellSequence
from am_memory.engines.llama_cpp.model import LayerShape, Model
from am_memory.engines.llama_cpp.state import Column, SequenceState
from am_memory.errors import CorruptSession, UnsupportedOperation
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.int8 import Rows, decoded
from am_memory.kv_cache.layers import LayerState, SlidingState, TailBuffer, TailState
from am_memory.kv_cache.slots import PINNED_RANK, Segment, Slots, carried_over, tail_start


@dataclass(frozen=True)
class Content:
    """What a cache holds at one moment, apart from the cells themselves.

    Attributes:
        sequence: its cells; it may hold later ones, too.
        num_tokens: logical.
        segments: compact ones.
        num_pinned: tokens at the start that stay exact; 0 before the first compaction.
        biases: of each layer, (num_heads, base_cells) float32, where they are kept beside the cells and there are any.
    """

    model: Model = field(repr=False)
    sequence: CellSequence = field(repr=False)
    num_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    num_pinned: int = 0
    biases: tuple[Tensor, ...] = ()

    @property
    def tail_start(self) -> int:
        return tail_start(self.segments)

    @property
    def num_tail_tokens(self) -> int:
        return self.num_tokens - self.tail_start

    @property
    def segment_cells(self) -> list[int]:
        """Of each segment."""
        return [num_cells(segment, self.model.num_heads) for segment in self.segments]

    @property
    def base_cells(self) -> int:
        """Before the tail."""
        return self.num_pinned + sum(self.segment_cells)

    @property
    def num_cells(self) -> int:
        return self.base_cells + self.num_tail_tokens

    @property
    def num_window_cells(self) -> int:
        """Of the layers with a sliding window: as many as all that may still be read sees, back to the tail's start."""
        if not self.model.windows:
            return 0
        return min(self.num_tokens, self.num_tail_tokens + self.model.window_tokens)

    @property
    def window_bytes(self) -> int:
        return self.num_window_cells * self.model.window_cell_bytes

    @property
    def nbytes(self) -> int:
        biases = sum(bias.nbytes for bias in self.biases)
        return self.num_cells * self.model.cell_bytes + self.window_bytes + biases

    @cached_property
    def cells(self) -> SequenceState:
        """All cells, taken out once."""
        return self.model.decoder.take(self.sequence, self.num_tokens)

    @property
    def layers(self) -> tuple[LayerState, ...]:
        """The cache as tensors, for whoever saves it, windows last; keys have their bias in them."""
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
    """One layer of a cache, read-only."""

    content: Content
    index: int

    @property
    def start(self) -> int:
        return self.content.tail_start

    @property
    def scaling(self) -> float:
        return self.shape.scaling

    @property
    def rotations(self) -> Tensor | None:
        return None if self.content.model.has_bias else self.shape.rotation.later

    @property
    def shape(self) -> LayerShape:
        return self.content.model.layers[self.index]

    def _entries(self, where: slice) -> tuple[Tensor, Tensor]:
        """(num_heads, num_cells, head_dim) of some cells."""
        cells = self.content.cells
        key, value = (column.take(where) for column in (cells.keys[self.index], cells.values[self.index]))
        return key.tensor(self.shape.num_heads), value.tensor(self.shape.num_heads)

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The exact keys and values at logical positions [start, end): (num_heads, end - start, head_dim)."""
        content = self.content
        assert content.tail_start <= start <= end <= content.num_tokens
        first = content.base_cells - content.tail_start
        return self._entries(slice(first + start, first + end))

    def turned(self, key: Tensor, distance: int) -> Tensor:
        """Keys of the layer, (num_heads, num_keys, head_dim), as they would be so many positions later."""
        return key @ self.shape.rotation.by(distance).mT.to(key.dtype) if distance else key

    @property
    def slots(self) -> Slots | None:
        content = self.content
        if not content.segments:
            return None
        num_heads, num_slots = self.shape.num_heads, content.base_cells
        key, value = self._entries(slice(0, num_slots))
        positions = torch.tensor(base_positions(content.segments, content.segment_cells, content.num_pinned))
        ranks = [PINNED_RANK] * content.num_pinned
        for count in content.segment_cells:
            ranks += [cell_rank(index, content.model.num_heads) for index in range(count)]
        biases = content.biases
        return Slots(
            key=key.reshape(-1, self.shape.head_dim),
            value=value.reshape(-1, self.shape.head_dim),
            bias=biases[self.index].flatten() if biases else key.new_zeros(num_heads * num_slots),
            positions=positions.int().repeat(num_heads),
            ranks=torch.tensor(ranks, dtype=torch.int32).repeat(num_heads),
            cu_slots=tuple(index * num_slots for index in range(num_heads + 1)),
        )

    def state(self) -> TailState:
        key, value = self.exact_entries(self.start, self.content.num_tokens)
        return TailState(self.slots, TailBuffer(key[None], value[None]), self.start, key.shape[1])


class CellCache:
    """The cache of one session; see `am_memory.engines.base.SessionCache` for what it answers."""

    is_croppable = True

    def __init__(self, model: Model) -> None:
        self._content = Content(model, CellSequence())

    @property
    def _model(self) -> Model:
        return self._content.model

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._content.segments

    @property
    def num_pinned(self) -> int:
        return self._content.num_pinned

    @property
    def compactable(self) -> Sequence[CellLayer]:
        return [CellLayer(self._content, index) for index in range(len(self._model.layers))]

    @property
    def num_tokens(self) -> int:
        """Logical length."""
        return self._content.num_tokens

    @property
    def tail_start(self) -> int:
        """Where the exact tail begins."""
        return self._content.tail_start

    @property
    def num_exact_tokens(self) -> int:
        """Pinned tokens and those of the tail."""
        return self.num_pinned + self._content.num_tail_tokens

    @property
    def num_heads(self) -> int:
        """KV heads of all layers together."""
        return self._model.num_heads

    @property
    def kv_tokens(self) -> float:
        """Physical size, in cells."""
        return float(self._content.num_cells)

    @property
    def nbytes(self) -> int:
        """What the cells take, and biases beside them."""
        return self._content.nbytes

    @property
    def exact_nbytes(self) -> int:
        """What an uncompacted cache of the same tokens would take."""
        return self.num_tokens * self._model.cell_bytes + self._content.window_bytes

    def state(self) -> Content:
        return self._content

    def restore(self, state: Snapshot) -> None:
        """Go back, or on, to a state of a cache of this model."""
        assert isinstance(state, Content)
        self._content = state

    def load(self, saved: Snapshot) -> None:
        """Take in a saved state.

        Raises:
            CorruptSession: the tensors are not the cells of such a cache.
        """
        self._content = from_tensors(self._model, saved)

    def truncate(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` logical tokens; the rest must be in the exact tail."""
        content = self._content
        if num_tokens < content.tail_start:
            raise UnsupportedOperation(
                f"cannot cut the cache to {num_tokens} tokens: only those after {content.tail_start} are exact; use "
                "Session.rewind, which rebuilds"
            )
        self._content = replace(content, num_tokens=num_tokens)

    def fork(self) -> CellCache:
        """A second cache with the same content; cells are shared until the second of the two appends."""
        branch = CellCache(self._model)
        branch._content = self._content
        self._content.sequence.share(self.num_tokens)
        return branch

    def read(self, token_ids: Sequence[int], num_logits: int, on_attention: OnAttention | None) -> Tensor:
        """Read tokens behind what it holds; see `Engine.forward`."""
        content, decoder = self._content, self._model.decoder
        if not content.sequence.claim(self, content.num_tokens):
            content = replace(content, sequence=decoder.copy(content.sequence))
            content.sequence.claim(self, content.num_tokens)
        num_cells = max(content.num_cells, content.num_window_cells)
        logits = decoder.read(content.sequence, token_ids, content.num_tokens, num_cells, num_logits, on_attention)
        self._content = replace(content, num_tokens=content.num_tokens + len(token_ids))
        return logits

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> Content:
        """The state in which `new_slots` stand for the tail's tokens up to the end of the last of `segments`.

        Args:
            segments: all segments afterwards, the new one last; older ones are cut to their `num_slots` and turned to
                their `shift`, pinned tokens with the oldest, and those that are not among them give way to the new one.
            new_slots: the new segment's slots of each layer, as many in each head, ranked within the segment.
            num_pinned: tokens at the start of the tail that stay exact (only before the first compaction).

        Returns:
            A new state; this cache is as it was.
        """
        old, newest = self._content, segments[-1]
        num_pinned = max(old.num_pinned, num_pinned)
        older, distances = carried_over(old.segments, segments)
        firsts = itertools.accumulate(old.segment_cells[:-1], initial=old.num_pinned)
        kept = [
            (slice(first, first + num_cells(segment, self.num_heads)), distance)
            for first, segment, distance in zip(firsts, older, distances, strict=False)
            if segment in segments
        ]
        places = [(slice(0, num_pinned), distances[0] if distances else 0), *kept]
        moved = (_moved(old.cells.take(where), old.model.layers, distance) for where, distance in places)
        parts = [*moved, _new_cells(old.cells, new_slots)]
        tail = slice(old.base_cells + newest.end - old.tail_start, old.num_cells)
        cells = SequenceState.join([*parts, old.cells.take(tail)])
        if old.cells.window is not None:
            seen_from = newest.end - old.model.window_tokens
            cells = replace(cells, window=old.cells.window.between(seen_from, old.num_tokens))
        counts = [part.num_cells for part in parts[1:]]
        content = packed(old.model, cells, tuple(segments), counts, num_pinned, old.num_tokens)
        if not old.model.has_bias:
            return content
        return with_biases(content, _joined_biases(old, [where for where, _ in places], new_slots))


def num_cells(segment: Segment, num_heads: int) -> int:
    """A cell is a slot of each head."""
    return segment.num_slots // num_heads


def cell_rank(index: int, num_heads: int) -> int:
    """The rank of a slot in the index-th cell of its segment: a cell is there when the last head's slot is."""
    return (index + 1) * num_heads - 1


def base_positions(segments: Sequence[Segment], counts: Sequence[int], num_pinned: int) -> list[int]:
    """Where the cells before the tail stand.

    Any place before the tail would do, as all of it is seen by all that follows; llama.cpp asks that they ascend, and
    that the last one is the one before the next token's.
    """
    positions = list(range(num_pinned))
    for segment, count in zip(segments, counts, strict=True):
        positions += range(segment.start, segment.start + count)
        if count:
            positions[-1] = segment.end - 1
    return positions


def packed(
    model: Model,
    cells: SequenceState,
    segments: tuple[Segment, ...],
    counts: Sequence[int],
    num_pinned: int,
    num_tokens: int,
) -> Content:
    """A cache of these cells, at the positions that they are to have."""
    tail = range(tail_start(segments), num_tokens)
    placed = cells.at([*base_positions(segments, counts, num_pinned), *tail])
    return Content(model, CellSequence(placed.pack()), num_tokens, segments, num_pinned)


def with_biases(content: Content, biases: tuple[Tensor, ...]) -> Content:
    """The same cells, as they are still to be put in, with biases beside them."""
    unscaled = [bias / layer.scaling for bias, layer in zip(biases, content.model.layers, strict=True)]
    return replace(content, sequence=CellSequence(content.sequence.blob, unscaled), biases=biases)


def _joined_biases(old: Content, places: Sequence[slice], new_slots: Sequence[Slots]) -> tuple[Tensor, ...]:
    """Of the cells that are kept, 0 for pinned ones, and of a new segment's."""
    joined = []
    for index, slots in enumerate(new_slots):
        held = old.biases[index] if old.biases else torch.zeros(slots.num_heads, places[0].stop)
        new = slots.bias.view(slots.num_heads, -1).take_along_dim(_by_rank(slots), dim=1).float()
        joined.append(torch.cat([*(held[:, where] for where in places), new], dim=1))
    return tuple(joined)


def _moved(cells: SequenceState, layers: Sequence[LayerShape], distance: int) -> SequenceState:
    """The cells as if their tokens had come so much later: their keys are turned."""
    if not distance or not cells.num_cells:
        return cells
    keys = []
    for key, layer in zip(cells.keys, layers, strict=True):
        turned = key.tensor(layer.num_heads).float() @ layer.rotation.by(distance).mT
        keys.append(key.like(turned))
    return replace(cells, keys=tuple(keys))


def _by_rank(slots: Slots) -> Tensor:
    """(num_heads, slots of a head): the highest rank first."""
    return slots.ranks.view(slots.num_heads, -1).argsort(dim=1)


def _new_cells(like: SequenceState, new_slots: Sequence[Slots]) -> SequenceState:
    """Cells of a new segment, the highest rank first."""
    keys, values, count = [], [], 0
    for slots, key, value in zip(new_slots, like.keys, like.values, strict=True):
        order = _by_rank(slots)[:, :, None]
        keys.append(key.like(_heads(slots.key, slots).take_along_dim(order, dim=1)))
        values.append(value.like(_heads(slots.value, slots).take_along_dim(order, dim=1)))
        count = order.shape[1]
    return SequenceState(np.zeros(count, dtype=np.int32), tuple(keys), tuple(values), like.is_transposed)


def _heads(rows: Rows, slots: Slots) -> Tensor:
    """(num_heads, slots of a head, head_dim)."""
    entries = decoded(rows)
    return entries.view(slots.num_heads, -1, entries.shape[-1])


def _window_state(cells: SequenceState | None, index: int, shape: LayerShape, num_tokens: int) -> SlidingState:
    assert cells is not None
    key, value = (column[index].tensor(shape.num_heads)[None] for column in (cells.keys, cells.values))
    return SlidingState(key, value, num_tokens)


def _window_cells(model: Model, saved: Snapshot, num_tokens: int) -> SequenceState | None:
    """What `_window_state` was made from."""
    layers = [layer for layer in saved.layers if isinstance(layer, SlidingState)]
    if len(layers) != len(model.windows):
        raise CorruptSession(
            f"a cache of {len(layers)} sliding windows is not one of this model's {len(model.windows)}"
        )
    like, keys, values = model.template.window, [], []
    if like is None:
        return None
    for layer, shape, key, value in zip(layers, model.windows, like.keys, like.values, strict=True):
        if layer.keys is None or layer.values is None or layer.keys.shape[1] != shape.num_heads:
            raise CorruptSession("a cache whose layers do not hold the same tokens is none of this engine's")
        keys.append(key.like(layer.keys[0]))
        values.append(value.like(layer.values[0]))
    positions = np.arange(num_tokens - len(keys[0].rows), num_tokens, dtype=np.int32)
    return SequenceState(positions, tuple(keys), tuple(values), like.is_transposed)


def from_tensors(model: Model, saved: Snapshot) -> Content:
    """The content that `Content.layers` was written from."""
    segments, num_pinned = saved.segments, saved.num_pinned
    layers = [layer for layer in saved.layers if isinstance(layer, TailState)]
    if len(layers) != len(model.layers):
        raise CorruptSession(f"a cache of {len(layers)} layers is not one of this model's {len(model.layers)}")
    if all(layer.buffer is None for layer in layers):
        return Content(model, CellSequence())
    counts = [num_cells(segment, model.num_heads) for segment in segments]
    base, keys, values = num_pinned + sum(counts), [], []
    for layer, shape, key, value in zip(layers, model.layers, model.template.keys, model.template.values, strict=True):
        if layer.buffer is None or layer.buffer.key.shape[1] != shape.num_heads or layer.length != layers[0].length:
            raise CorruptSession("a cache whose layers do not hold the same tokens is none of this engine's")
        expected = tuple(index * base for index in range(shape.num_heads + 1)) if segments else None
        if (layer.slots.cu_slots if layer.slots is not None else None) != expected:
            raise CorruptSession(
                f"a cache whose heads differ in their slots has no {base} cells: it is another engine's"
            )
        parts = [(layer.buffer.key[0], layer.buffer.value[0])]
        if layer.slots is not None:
            parts.insert(0, (_heads(layer.slots.key, layer.slots), _heads(layer.slots.value, layer.slots)))
        keys.append(Column.join([key.like(part) for part, _ in parts]))
        values.append(Column.join([value.like(part) for _, part in parts]))
    num_tokens = layers[0].start + layers[0].length
    cells = SequenceState(model.template.positions, tuple(keys), tuple(values), model.template.is_transposed)
    cells = replace(cells, window=_window_cells(model, saved, num_tokens))
    content = packed(model, cells, segments, counts, num_pinned, num_tokens)
    if not (model.has_bias and segments):
        return content
    biases = (layer.slots.bias.view(layer.slots.num_heads, -1) for layer in layers if layer.slots is not None)
    return with_biases(content, tuple(bias.float() for bias in biases))
