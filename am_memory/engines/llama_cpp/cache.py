"""The cache of one session in llama.cpp: reading, rewinding, forks and compaction. Knows no policy and no solver.

`cells.py` describes the content. A snapshot is a handful of references: cells stay until other tokens are read in their
place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from am_memory.engines.llama_cpp.capture import OnAttention
from am_memory.engines.llama_cpp.cells import CacheContent, CellLayer, heads_of, num_cells, packed
from am_memory.engines.llama_cpp.decoder import CellSequence
from am_memory.engines.llama_cpp.model import CellModel, LayerShape
from am_memory.engines.llama_cpp.saved import from_tensors
from am_memory.engines.llama_cpp.state import SequenceState
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import Snapshot, cache_repr
from am_memory.kv_cache.slots import Segment, Slots, carried_over


class CellCache:
    """The cache of one session; see `am_memory.engines.base.SessionCache`."""

    is_croppable = can_drop_tokens = True

    def __init__(self, model: CellModel) -> None:
        self._content = CacheContent(model, CellSequence())

    def __repr__(self) -> str:
        return cache_repr(self)

    @property
    def _model(self) -> CellModel:
        return self._content.model

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._content.segments

    @property
    def num_pinned_slots(self) -> int:
        return self._content.num_pinned_slots

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
        return self.num_pinned_slots + self._content.num_tail_tokens

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
        """Memory that cells take."""
        return self._content.nbytes

    @property
    def exact_nbytes(self) -> int:
        """Memory that an uncompacted cache of the same tokens would take."""
        return self.num_tokens * self._model.cell_bytes + self._content.window_bytes

    def state(self) -> CacheContent:
        return self._content

    def restore(self, state: Snapshot) -> None:
        """Go back, or on, to a state of a cache of this model."""
        assert isinstance(state, CacheContent)
        self._content = state

    def load(self, saved: Snapshot) -> None:
        """Take in a state that was saved by another process.

        Raises:
            CorruptSession: the tensors are not the cells of this model's caches.
        """
        self._content = from_tensors(self._model, saved)

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` logical tokens; what is forgotten must be in the exact tail."""
        content = self._content
        if num_tokens < content.tail_start:
            raise UnsupportedOperation(
                f"cannot cut the cache to {num_tokens} tokens: only those after {content.tail_start} are exact; use "
                "Session.rewind, which rebuilds"
            )
        self._content = replace(content, num_tokens=num_tokens)

    def fork(self) -> CellCache:
        """A second cache with the same content; cells are shared until both have read more."""
        branch = CellCache(self._model)
        branch._content = self._content
        self._content.sequence.share(self.num_tokens)
        return branch

    def read(self, token_ids: Sequence[int], num_logits: int, on_attention: OnAttention | None) -> Tensor:
        """Read tokens; see `Engine.forward`."""
        content, decoder = self._content, self._model.decoder
        if not content.sequence.claim(self, content.num_tokens):
            content = replace(content, sequence=decoder.copy(content.sequence))
            content.sequence.claim(self, content.num_tokens)
        num_cells = max(content.num_cells, content.num_window_cells)
        logits = decoder.read(content.sequence, token_ids, content.num_tokens, num_cells, num_logits, on_attention)
        self._content = replace(content, num_tokens=content.num_tokens + len(token_ids))
        return logits

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> CacheContent:
        """The state after a compaction; see `am_memory.engines.base.SessionCache`.

        Args:
            segments, num_pinned: see there; pinned keys rotate with the oldest segment.
            new_slots: the same number in each head, one `Slots` for each layer.
        """
        old, newest = self._content, segments[-1]
        num_pinned = max(old.num_pinned_slots, num_pinned)
        older, distances = carried_over(old.segments, segments)
        firsts = itertools.accumulate(old.segment_cells[:-1], initial=old.num_pinned_slots)
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
        return packed(old.model, cells, tuple(segments), counts, num_pinned, old.num_tokens)


def _moved(cells: SequenceState, layers: Sequence[LayerShape], distance: int) -> SequenceState:
    """The cells with their keys rotated to `distance` positions later."""
    if not distance or not cells.num_cells:
        return cells
    keys = []
    for key, layer in zip(cells.keys, layers, strict=True):
        rotated = key.tensor(layer.num_heads).float() @ layer.rotation.by(distance).mT
        keys.append(key.like(rotated))
    return replace(cells, keys=tuple(keys))


def _by_rank(slots: Slots) -> Tensor:
    """Indices of each head's slots by rank, most important first: (num_heads, slots of a head)."""
    return slots.ranks.view(slots.num_heads, -1).argsort(dim=1)


def _new_cells(like: SequenceState, new_slots: Sequence[Slots]) -> SequenceState:
    """The cells of a new segment, most important first."""
    keys, values, count = [], [], 0
    for slots, key, value in zip(new_slots, like.keys, like.values, strict=True):
        order = _by_rank(slots)[:, :, None]
        keys.append(key.like(heads_of(slots.key, slots).take_along_dim(order, dim=1)))
        values.append(value.like(heads_of(slots.value, slots).take_along_dim(order, dim=1)))
        count = order.shape[1]
    return SequenceState(np.zeros(count, dtype=np.int32), tuple(keys), tuple(values), like.is_transposed)
