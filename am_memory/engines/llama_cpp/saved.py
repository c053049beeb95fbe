"""A saved llama.cpp cache: tensors back to cells. Knows no session and no compaction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from am_memory.engines.llama_cpp.cells import CacheContent, heads_of, num_cells, packed
from am_memory.engines.llama_cpp.decoder import CellSequence
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.state import Column, SequenceState
from am_memory.errors import CorruptSession
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.layers import SlidingState, TailState


def _window_cells(model: CellModel, saved: Snapshot, num_tokens: int) -> SequenceState | None:
    """The cells of sliding windows from their saved tensors."""
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


def from_tensors(model: CellModel, saved: Snapshot) -> CacheContent:
    """The content from the tensors of `CacheContent.layers`."""
    segments, num_pinned = saved.segments, saved.num_pinned_slots
    layers = [layer for layer in saved.layers if isinstance(layer, TailState)]
    if len(layers) != len(model.layers):
        raise CorruptSession(f"a cache of {len(layers)} layers is not one of this model's {len(model.layers)}")
    if all(layer.buffer is None for layer in layers):
        return CacheContent(model, CellSequence())
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
            parts.insert(0, (heads_of(layer.slots.key, layer.slots), heads_of(layer.slots.value, layer.slots)))
        keys.append(Column.join([key.like(part) for part, _ in parts]))
        values.append(Column.join([value.like(part) for _, part in parts]))
    num_tokens = layers[0].start + layers[0].length
    cells = SequenceState(model.template.positions, tuple(keys), tuple(values), model.template.is_transposed)
    cells = replace(cells, window=_window_cells(model, saved, num_tokens))
    return packed(model, cells, segments, counts, num_pinned, num_tokens)
