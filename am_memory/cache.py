"""The KV cache of one session: ragged compact slots, then an exact tail that grows in place.

Owns the layout `[pinned exact][segment 1]...[segment n][exact tail]`, logical against physical length, sharing between
forks, and its own bytes. Knows no model, no policy, and not how slots are computed.

What makes it safe: slots are immutable, and a tail only ever writes behind its own length. A snapshot is therefore a
handful of references, restoring it is exact, and forks share memory until one of them appends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from am_memory.errors import UnsupportedOperation
from am_memory.rotation import Rotation
from am_memory.slots import Segment, Slots

QuerySink = Callable[[Tensor, Tensor], None]
"""Gets what passes a layer: the queries, (num_key_value_heads, num_key_value_groups, num_tokens, head_dim) after RoPE,
and the log of the mass that each spent on everything it saw, (the same without head_dim) float32."""


class TailBuffer:
    """Room for exact entries; written in place by its one user, copied before writing once it `is_shared`."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key  # (1, num_key_value_heads, capacity, head_dim)
        self.value = value
        self.is_shared = False

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    def grown(self, num_used: int, capacity: int) -> TailBuffer:
        """A buffer of our own with the first `num_used` entries."""
        shape = (*self.key.shape[:2], capacity, self.key.shape[3])
        buffer = TailBuffer(self.key.new_empty(shape), self.value.new_empty(shape))
        buffer.key[:, :, :num_used] = self.key[:, :, :num_used]
        buffer.value[:, :, :num_used] = self.value[:, :, :num_used]
        return buffer


class TailState(NamedTuple):
    """What a compactable layer is at one moment: references only."""

    slots: Slots | None
    buffer: TailBuffer | None
    start: int
    length: int


class SlidingState(NamedTuple):
    """What a sliding-window layer is at one moment; transformers never writes into these tensors."""

    keys: Tensor | None
    values: Tensor | None
    num_tokens: int


class CompactableLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One full-attention layer: compact slots (or none yet), then exact entries in a buffer that grows in place.

    The keys that `update` returns are the exact tail alone. They carry this layer as `am_layer`, which is how the
    attention function finds the slots that belong before them.

    Args:
        rotation: how the layer turns its keys with their position; None: slots stay where they were written.
    """

    is_sliding = False
    is_croppable = True
    rotations: Tensor | None = None  # slots have biases of their own

    def __init__(self, rotation: Rotation | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rotation = rotation
        self.slots: Slots | None = None
        self.buffer: TailBuffer | None = None
        self.start = 0  # logical position of the first exact entry
        self.length = 0  # exact entries in use
        self.query_sink: QuerySink | None = None
        self.scaling: float | None = None  # softmax scale, as the attention function last saw it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.buffer = TailBuffer(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (1, num_key_value_heads, num_tokens, head_dim); return the whole exact tail."""
        if key_states.shape[0] != 1:
            raise UnsupportedOperation(
                f"a batch of {key_states.shape[0]} sequences; a session holds one: use one session for each"
            )
        if self.buffer is None:
            self.lazy_initialization(key_states, value_states)
        buffer = self.buffer
        assert buffer is not None
        end = self.length + key_states.shape[2]
        if end > buffer.capacity or buffer.is_shared:
            # At most 1/64 stands empty, so that bytes stay honest; a decoded token copies 64 entries on average.
            buffer = self.buffer = buffer.grown(self.length, end + end // 64)
        buffer.key[:, :, self.length : end] = key_states
        buffer.value[:, :, self.length : end] = value_states
        self.length = end
        key = buffer.key[:, :, :end]
        key.am_layer = self  # type: ignore[attr-defined]
        return key, buffer.value[:, :, :end]

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of the exact keys and values at logical positions [start, end): (num_heads, end - start, head_dim)."""
        assert self.buffer is not None
        assert self.start <= start <= end <= self.start + self.length
        where = slice(start - self.start, end - self.start)
        return self.buffer.key[0, :, where], self.buffer.value[0, :, where]

    def turned(self, key: Tensor, distance: int) -> Tensor:
        """Keys of the layer, (num_key_value_heads, num_keys, head_dim), as they would be so many positions later."""
        if not distance:
            return key
        assert self.rotation is not None
        return self.rotation.turned(key, tensor(distance))

    @property
    def num_heads(self) -> int:
        return 0 if self.buffer is None else self.buffer.key.shape[1]

    def state(self) -> TailState:
        return TailState(self.slots, self.buffer, self.start, self.length)

    def restore(self, state: LayerState) -> None:
        assert isinstance(state, TailState)
        self.slots, self.buffer, self.start, self.length = state
        self.is_initialized = self.buffer is not None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        exact = () if self.buffer is None else (self.buffer.key, self.buffer.value)
        return exact + (self.slots.tensors if self.slots is not None else ())

    def get_seq_length(self) -> int:
        """Logical length: tokens ever seen, compacted or not."""
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens: the attention function knows that everything before them is visible."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; they must be exact ones."""
        if tokens_to_remove > 0:
            raise UnsupportedOperation(f"crop({tokens_to_remove}): give the tokens to remove as a negative number")
        if -tokens_to_remove > self.length:
            raise UnsupportedOperation(
                f"cannot remove {-tokens_to_remove} tokens from the cache: only the last {self.length} are exact; "
                "use Session.rewind, which rebuilds"
            )
        self.length += tokens_to_remove

    def reset(self) -> None:
        self.restore(TailState(None, None, 0, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UnsupportedOperation("beam search needs one cache per beam; use greedy decoding or sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            raise UnsupportedOperation(f"{repeats} sequences at once; a session holds one: fork it instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.numel() != 1:
            raise UnsupportedOperation(f"{indices.numel()} sequences at once; a session holds one: fork it instead")


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window layer, left as transformers has it; a full one can only be put back to a state it had."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the window still holds everything, or (assisted decoding) is kept longer than it need be."""
        return self.record_past or self.cumulative_length < self.sliding_window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        everything = super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        if self.keys.untyped_storage().nbytes() > 1.5 * self.keys.nbytes:  # the whole of a long chunk
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return everything

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove or self.record_past:
            super().crop(tokens_to_remove)

    def state(self) -> SlidingState:
        return SlidingState(self.keys, self.values, self.cumulative_length)

    def restore(self, state: LayerState) -> None:
        assert isinstance(state, SlidingState)
        self.keys, self.values, self.cumulative_length = state
        self.is_initialized = self.keys is not None
        if self.keys is not None:
            self.dtype, self.device = self.keys.dtype, self.keys.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return () if self.keys is None or self.values is None else (self.keys, self.values)


LayerState = TailState | SlidingState


class Snapshot(Protocol):
    """A whole cache at one moment, as whoever saves it sees it; an engine's own cache may have a state of its own."""

    @property
    def layers(self) -> tuple[LayerState, ...]: ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    @property
    def num_pinned(self) -> int: ...


@dataclass(frozen=True)
class CacheState:
    """A whole cache at one moment, as references; `KVCache.restore` takes it back exactly."""

    layers: tuple[LayerState, ...]
    segments: tuple[Segment, ...]
    num_pinned: int

    def exchanged(self, segment: Segment, new_slots: Sequence[Slots]) -> CacheState:
        """The state in which other slots stand for a segment's tokens.

        Args:
            segment: one of `segments`; it keeps its `num_slots`, whatever the number of the new ones.
            new_slots: of each compactable layer.
        """
        slots_of_layer = iter(new_slots)
        states: list[LayerState] = []
        for state in self.layers:
            if isinstance(state, TailState):
                assert state.slots is not None
                before = state.slots.where(state.slots.positions < segment.start)
                after = state.slots.where(state.slots.positions >= segment.end)
                states.append(state._replace(slots=Slots.concat([before, next(slots_of_layer), after])))
            else:
                states.append(state)
        return replace(self, layers=tuple(states))


BeforeForward = Callable[[Sequence[int]], int]
"""Called with the tokens that a model is about to read into a cache; says how many of the first are read already."""


class KVCache(Cache):
    """The cache of one session, usable wherever transformers takes a `Cache`.

    Args:
        sliding_windows: for each layer of the model its sliding window in tokens, or None for full attention.
        rotations: how each layer of the model turns its keys; None: slots stay where they were written.

    Attributes:
        before_forward: set where somebody else drives the model (`generate`), to watch what it reads.
    """

    layers: list[CompactableLayer | SlidingLayer]  # type: ignore[assignment]
    has_ragged_heads = True

    def __init__(self, sliding_windows: Sequence[int | None], rotations: Sequence[Rotation] | None = None) -> None:
        each: Sequence[Rotation | None] = rotations or [None] * len(sliding_windows)
        super().__init__(
            layers=[
                CompactableLayer(rotation) if window is None else SlidingLayer(window)
                for window, rotation in zip(sliding_windows, each, strict=True)
            ]
        )
        self.sliding_windows, self.rotations = tuple(sliding_windows), rotations
        self.segments: tuple[Segment, ...] = ()
        self.num_pinned = 0
        self.before_forward: BeforeForward | None = None

    @property
    def compactable(self) -> list[CompactableLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompactableLayer)]

    @property
    def num_tokens(self) -> int:
        """Logical length."""
        return self.get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: what every layer has seen, also when a forward pass was interrupted between two of them."""
        return min(layer.get_seq_length() for layer in self.layers)

    @property
    def num_tail_tokens(self) -> int:
        """Exact tokens behind the segments; before the first compaction this is everything."""
        return self.compactable[0].length

    @property
    def num_exact_tokens(self) -> int:
        """Exact tokens: pinned ones and the tail."""
        return self.num_pinned + self.num_tail_tokens

    @property
    def num_compact_slots(self) -> float:
        """Mean compact slots per KV head, over all compactable layers; pinned entries count as exact."""
        num_slots = sum(layer.slots.num_slots for layer in self.compactable if layer.slots is not None)
        return num_slots / self.num_heads - self.num_pinned if num_slots else 0.0

    @property
    def num_heads(self) -> int:
        """KV heads of all compactable layers together."""
        return sum(layer.num_heads for layer in self.compactable)

    @property
    def kv_tokens(self) -> float:
        """Physical size: exact tokens + mean compact slots per head."""
        return self.num_exact_tokens + self.num_compact_slots

    @property
    def nbytes(self) -> int:
        """What keys, values and biases take in the device's memory, with spare capacity."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors)

    @property
    def exact_nbytes(self) -> int:
        """What an uncompacted cache of the same tokens would take."""
        per_token = sum(
            2 * layer.num_heads * layer.buffer.key.shape[3] * layer.buffer.key.element_size()
            for layer in self.compactable
            if layer.buffer is not None
        )
        sliding = (
            tensor.nbytes for layer in self.layers if isinstance(layer, SlidingLayer) for tensor in layer.tensors
        )
        return per_token * self.num_tokens + sum(sliding)

    def state(self) -> CacheState:
        return CacheState(tuple(layer.state() for layer in self.layers), self.segments, self.num_pinned)

    def restore(self, state: Snapshot) -> None:
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            layer.restore(layer_state)
        self.segments, self.num_pinned = state.segments, state.num_pinned

    def fork(self) -> KVCache:
        """A second cache with the same content; memory is shared until one of the two appends."""
        branch = KVCache(self.sliding_windows, self.rotations)
        for mine, other in zip(self.layers, branch.layers, strict=True):
            other.restore(mine.state())
            if isinstance(mine, CompactableLayer) and isinstance(other, CompactableLayer):
                other.scaling = mine.scaling
                if mine.buffer is not None:
                    mine.buffer.is_shared = True
        branch.segments, branch.num_pinned = self.segments, self.num_pinned
        return branch

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> CacheState:
        """The state in which `new_slots` stand for the tail's tokens up to the end of the last of `segments`.

        Args:
            segments: all segments afterwards, the new one last; older ones are cut to their `num_slots` and turned to
                their `shift`, and those that are not among them give way to the new one.
            new_slots: the new segment's slots of each compactable layer, ranked within the segment.
            num_pinned: tokens at the start of the tail that stay exact (only before the first compaction).

        Returns:
            A new state; this cache is as it was. The remaining tail is copied, so that the old buffer can be freed.
        """
        newest = segments[-1]
        resized = {segment.start: segment for segment in segments[:-1]}
        older = [resized.get(segment.start, replace(segment, num_slots=0)) for segment in self.segments]
        distances = [after.shift - before.shift for before, after in zip(self.segments, older, strict=True)]
        slots_of_layer = iter(new_slots)
        states: list[LayerState] = []
        for layer in self.layers:
            if not isinstance(layer, CompactableLayer):
                states.append(layer.state())
                continue
            parts = []
            if layer.slots is not None:
                kept = layer.slots.cut(older)
                parts.append(kept.turned(layer.rotation, older, distances) if layer.rotation else kept)
            elif num_pinned:
                parts.append(Slots.exact(*layer.exact_entries(0, num_pinned), start=0))
            slots = Slots.concat([*parts, next(slots_of_layer)])
            key, value = layer.exact_entries(newest.end, layer.get_seq_length())
            tail = TailBuffer(key[None].clone(), value[None].clone())
            states.append(TailState(slots, tail, newest.end, key.shape[1]))
        return CacheState(tuple(states), tuple(segments), max(self.num_pinned, num_pinned))

    def reset(self) -> None:
        super().reset()  # type: ignore[no-untyped-call]
        self.segments, self.num_pinned = (), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, in all layers or in none."""
        if tokens_to_remove and not self.is_croppable:
            raise UnsupportedOperation(
                f"cannot remove {-tokens_to_remove} tokens from the cache: a sliding window has forgotten what came "
                "before them; use Session.rewind, which rebuilds"
            )
        super().crop(tokens_to_remove)

    @property
    def is_whole(self) -> bool:
        """Whether all layers have seen the same tokens; an interrupted forward pass leaves the first ones ahead."""
        return len({layer.get_seq_length() for layer in self.layers}) == 1

    def truncate(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` logical tokens; the rest must be in the exact tail."""
        self.crop(num_tokens - self.num_tokens)
