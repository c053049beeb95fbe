"""The layers of a KV cache that hold keys: compact slots before an exact tail that grows in place, or a window.

A layer appends entries, shares them between forks and drops them. It knows no other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, as_tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.rotation import Rotation
from am_memory.kv_cache.slots import Segment, Slots

QuerySink = Callable[[Tensor, Tensor], None]
"""Called with the queries of a layer, (num_key_value_heads, num_key_value_groups, num_tokens, head_dim) after RoPE, and
the log of each query's attention mass on all keys, (the same without head_dim) float32. If several layers of the model
read the cache layer, the groups are those of all of them, one layer after the other, and the call comes in the last
one. It may compact the layer: attention is then computed again, over its new content, for the layer that runs."""


class TailBuffer:
    """Memory for exact entries. One layer writes into it in place; once it `is_shared`, it is copied before writing."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key  # (1, num_key_value_heads, capacity, head_dim)
        self.value = value  # the same, of the values' width
        self.is_shared = False

    @property
    def capacity(self) -> int:
        return self.key.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that takes memory here."""
        return self.key, self.value

    def grown(self, num_used: int, capacity: int) -> TailBuffer:
        """A copy of the first `num_used` entries, in a buffer of another capacity."""
        key, value = (
            entries.new_empty(*entries.shape[:2], capacity, entries.shape[3]) for entries in (self.key, self.value)
        )
        buffer = TailBuffer(key, value)
        buffer.key[:, :, :num_used] = self.key[:, :, :num_used]
        buffer.value[:, :, :num_used] = self.value[:, :, :num_used]
        return buffer


class TailState(NamedTuple):
    """A compactable layer at one moment: references only."""

    slots: Slots | None
    buffer: TailBuffer | None
    start: int
    length: int

    @property
    def head_slots(self) -> list[int]:
        """Slots of each KV head, pinned ones included."""
        if self.slots is not None:
            return [end - begin for begin, end in pairwise(self.slots.cu_slots)]
        return [0] * (0 if self.buffer is None else self.buffer.key.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        exact = () if self.buffer is None else self.buffer.tensors
        compact = () if self.slots is None else self.slots.tensors
        return sum(tensor.nbytes for tensor in (*exact, *compact))


class SlidingState(NamedTuple):
    """A sliding-window layer at one moment; nobody writes into these tensors."""

    keys: Tensor | None
    values: Tensor | None
    num_tokens: int

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu") if self.keys is None else self.keys.device

    def to(self, device: torch.device | str) -> SlidingState:
        """The same state on a device; it keeps no larger tensors, of which these are views."""
        key, value = (None if tensor is None else _alone(tensor.to(device)) for tensor in (self.keys, self.values))
        return SlidingState(key, value, self.num_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values) if tensor is not None)


def _alone(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


class RecurrentState(NamedTuple):
    """The states of one layer that has no keys at one moment; nobody writes into these tensors."""

    conv: tuple[Tensor | None, ...]
    recurrent: tuple[Tensor | None, ...]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device if self.tensors else torch.device("cpu")

    def to(self, device: torch.device | str) -> RecurrentState:
        """The same state on a device."""
        return RecurrentState(*(tuple(one if one is None else one.to(device) for one in tensors) for tensors in self))

    @property
    def num_states(self) -> int:
        """The number of states of each of both sorts; 0: a layer without a cache."""
        return len(self.conv)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The states that are there."""
        return tuple(tensor for tensor in (*self.conv, *self.recurrent) if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


LayerState = TailState | SlidingState | RecurrentState


class CompactableLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One full-attention layer: compact slots (or none yet), then exact entries in a buffer that grows in place.

    `update` returns the keys of the exact tail alone, with this layer in their attribute `am_layer`. The attention
    function finds the slots there.

    Args:
        rotation: the layer's RoPE; None: slots stay at the positions at which they were written.
        num_readers: layers of the model that attend to these entries, one after the other in each pass.

    Attributes:
        waiting: queries and log masses of the pass under way, of the layers that have run, until the last one has.
        write_position: (1,) int64 in the device's memory. While it is set, `update` writes its one token there in the
            tail, which must have room, and returns the whole buffer; whoever set it counts the token.
    """

    is_sliding = False
    is_croppable = True
    query_rotations: Tensor | None = None  # slots have biases of their own

    def __init__(self, rotation: Rotation | None = None, num_readers: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rotation, self.num_readers = rotation, num_readers
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.slots: Slots | None = None
        self.buffer: TailBuffer | None = None
        self.start = 0  # logical position of the first exact entry
        self.length = 0  # exact entries in use
        self.write_position: Tensor | None = None
        self.query_sink: QuerySink | None = None
        self.scaling: float | None = None  # softmax scale, as the attention function last saw it
        self.softcap: float | None = None  # where scores are capped, likewise
        self.sinks: Tensor | None = None  # the logit of each query head's attention sink, likewise

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.buffer = TailBuffer(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (1, num_key_value_heads, num_tokens, head_dim); return the whole exact tail."""
        self.waiting = []  # of an interrupted pass
        if self.write_position is not None:
            return self._write_at(self.write_position, key_states, value_states)
        if key_states.shape[0] != 1:
            raise UnsupportedOperation(
                f"a batch of {key_states.shape[0]} sequences; a session holds one: use one session for each"
            )
        if self.buffer is None:
            self.lazy_initialization(key_states, value_states)
        buffer = self.buffer
        assert buffer is not None
        end = self.length + key_states.shape[2]
        if key_states.shape[2] > self.room:
            # At most 1/64 is spare, so that `nbytes` stays near what is used; a token copies 64 entries on average.
            buffer = self.buffer = buffer.grown(self.length, end + end // 64)
        buffer.key[:, :, self.length : end] = key_states
        buffer.value[:, :, self.length : end] = value_states
        self.length = end
        key, value = self.tail
        key.am_layer = self  # type: ignore[attr-defined]
        return key, value

    def _write_at(self, write_position: Tensor, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        assert self.buffer is not None
        key, value = self.buffer.key[:], self.buffer.value
        key.index_copy_(2, write_position, key_states)
        value.index_copy_(2, write_position, value_states)
        key.am_layer = self  # type: ignore[attr-defined]
        return key, value

    def hand_out(self, query: Tensor, log_mass: Tensor) -> None:
        """Give the query sink, if there is one, what a reading layer asked; it gets that of all layers together."""
        if self.query_sink is None:
            return
        if self.num_readers > 1:
            self.waiting.append((query, log_mass))
            if len(self.waiting) < self.num_readers:
                return
            query, log_mass = (torch.cat(parts, dim=1) for parts in zip(*self.waiting, strict=True))
            self.waiting = []
        self.query_sink(query, log_mass)

    @property
    def room(self) -> int:
        """Entries that can be written without another buffer."""
        return 0 if self.buffer is None or self.buffer.is_shared else self.buffer.capacity - self.length

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more entries, unless there is room for half as many."""
        assert self.buffer is not None
        if self.room < num_tokens // 2:
            self.buffer = self.buffer.grown(self.length, self.length + max(num_tokens, self.length // 64))

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Views of exact keys and values at the logical positions [start, end): (num_heads, end - start, head_dim)."""
        assert self.buffer is not None
        assert self.start <= start <= end <= self.start + self.length
        where = slice(start - self.start, end - self.start)
        return self.buffer.key[0, :, where], self.buffer.value[0, :, where]

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Views of all exact keys and values: (1, num_key_value_heads, length, head_dim)."""
        assert self.buffer is not None
        return self.buffer.key[:, :, : self.length], self.buffer.value[:, :, : self.length]

    def compacted(
        self, older: Sequence[Segment], distances: Sequence[int], newest: Segment, new_slots: Slots, num_pinned: int
    ) -> TailState:
        """The state in which `new_slots` stand for the tail's tokens up to the end of the newest segment.

        Args:
            older: the segments that the layer holds now, cut to their `num_slots`.
            distances: by how many positions each of them is rotated.
            num_pinned: tokens at the start of the tail that stay exact; it matters at the first compaction only.

        Returns:
            The state. Its tail is a copy, so that the old buffer can be freed.
        """
        parts = []
        if self.slots is not None:
            kept = self.slots.cut(older)
            parts.append(kept.rotated(self.rotation, older, distances) if self.rotation else kept)
        if self.start == 0 and num_pinned:
            parts.append(Slots.exact(*self.exact_entries(0, num_pinned), start=0))
        key, value = self.exact_entries(newest.end, self.get_seq_length())
        tail = TailBuffer(key[None].clone(), value[None].clone())
        return TailState(Slots.concat([*parts, new_slots]), tail, newest.end, key.shape[1])

    def before(self, segment: Segment, older: Sequence[Segment], key: Tensor, value: Tensor) -> TailState:
        """The state in which a segment is the exact tail; see `am_memory.engines.base.RefinableCache.before`.

        Args:
            older: the segments before it.
            key, value: the segment's exact entries, (num_key_value_heads, num_tokens, head_dim), on any device.
        """
        assert self.slots is not None
        assert self.buffer is not None
        slots = self.slots.where(self.slots.positions < segment.start)
        if self.rotation is not None:  # without older segments, only pinned keys are turned back
            shifts = [min(held.shift - segment.shift, segment.start - held.end) for held in older]
            distances = [shift - held.shift for shift, held in zip(shifts, older, strict=True)] or [-segment.shift]
            slots = slots.rotated(self.rotation, older or [segment], distances)
        buffer = TailBuffer(*(entries[None].to(self.buffer.key.device) for entries in (key, value)))
        return TailState(slots if segment.start else None, buffer, segment.start, segment.num_tokens)

    def rotated(self, key: Tensor, distance: int | Tensor) -> Tensor:
        """Keys rotated to later positions; see `am_memory.engines.base.SessionLayer.rotated`."""
        if isinstance(distance, int) and not distance:
            return key
        assert self.rotation is not None
        return self.rotation.rotated(key, as_tensor(distance))

    @property
    def num_heads(self) -> int:
        if self.buffer is not None:
            return self.buffer.key.shape[1]
        return 0 if self.slots is None else self.slots.num_heads  # of a text that is mounted before the first token

    def state(self) -> TailState:
        return TailState(self.slots, self.buffer, self.start, self.length)

    def restore(self, state: LayerState) -> None:
        assert isinstance(state, TailState)
        self.slots, self.buffer, self.start, self.length = state
        self.is_initialized = self.buffer is not None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        exact = () if self.buffer is None else self.buffer.tensors
        return exact + (self.slots.tensors if self.slots is not None else ())

    def get_seq_length(self) -> int:
        """Logical length: tokens read, compacted or not."""
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens; the attention function makes all earlier ones visible."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, which must be exact."""
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


class LatentLayer(CompactableLayer):  # type: ignore[no-untyped-call]
    """A layer of latent vectors (MLA), as one KV head. A key is the part with RoPE and the latent; a value the latent.

    The latents are held twice, since a slot's value is fitted apart from its key.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append latents (1, 1, num_tokens, kv_lora_rank) and parts with RoPE (1, 1, num_tokens, qk_rope_head_dim)."""
        return super().update(torch.cat([value_states, key_states], dim=3), key_states, *args, **kwargs)


class SlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding-window layer of transformers. Once it is full, it can only return to an earlier state."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be dropped: the window is not full, or assisted decoding keeps more than it."""
        return self.record_past or self.cumulative_length < self.sliding_window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        everything = super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None
        assert self.values is not None
        if self.keys.untyped_storage().nbytes() > 1.5 * self.keys.nbytes:  # a view of a whole chunk
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
