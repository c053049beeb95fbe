"""The KV cache of one session, for transformers: ragged compact slots, then an exact tail that grows in place.

    [pinned exact][segment 1]...[segment n][exact tail]

Slots are immutable, and a tail only writes behind its own length. A snapshot is therefore a handful of references,
restoring it is exact, and forks share memory until one of them appends. Who truncates a tail, reads and then restores a
longer state puts back the entries that were written over, as `queries.scratch` does. Knows no model, no policy, and not
how slots are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from torch import Tensor

from am_memory.errors import CorruptSession, UnsupportedOperation
from am_memory.formatting import counted, mebibytes
from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.kinds import CacheLayer, LayerKind
from am_memory.kv_cache.layers import CompactableLayer, LayerState, SlidingLayer, SlidingState, TailState
from am_memory.kv_cache.recurrent import RecurrentLayer, WithRecurrentStates
from am_memory.kv_cache.rotation import Rotation
from am_memory.kv_cache.slots import Segment, Slots, carried_over, tail_start


class Snapshot(Protocol):
    """A whole cache at one moment, as it can be saved. Each engine may have its own class for it."""

    @property
    def layers(self) -> tuple[LayerState, ...]: ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    @property
    def num_pinned_slots(self) -> int: ...


@dataclass(frozen=True)
class CacheState:
    """The plain `Snapshot`: references to the tensors of every layer."""

    layers: tuple[LayerState, ...]
    segments: tuple[Segment, ...]
    num_pinned_slots: int


def exchanged(state: Snapshot, tokens: tuple[int, int], new_slots: Sequence[Slots]) -> CacheState:
    """The state in which other slots stand for some compacted tokens, or for those of a mounted text.

    Args:
        tokens: [start, end), of one segment, whose `num_slots` stays, whatever the number of new slots.
        new_slots: one `Slots` for each compactable layer.
    """
    slots_of_layer = iter(new_slots)
    layers = (
        layer._replace(slots=_unless_empty(_exchanged(layer.slots, tokens, next(slots_of_layer)), state.segments))
        if isinstance(layer, TailState)
        else layer
        for layer in state.layers
    )
    return CacheState(tuple(layers), state.segments, state.num_pinned_slots)


def _exchanged(slots: Slots | None, tokens: tuple[int, int], new_slots: Slots) -> Slots:
    """The slots of one layer after an exchange; None: it had no slots."""
    if slots is None:
        return new_slots
    start, end = tokens
    return Slots.concat([slots.where(slots.positions < start), new_slots, slots.where(slots.positions >= end)])


def _unless_empty(slots: Slots, segments: Sequence[Segment]) -> Slots | None:
    """The slots of a layer; None without any, as in a layer of which nothing was compacted."""
    return slots if segments or slots.num_slots else None


def without_mounted(state: Snapshot, tokens: tuple[int, int] | None = None) -> CacheState:
    """The state without the slots of one mounted text.

    Args:
        tokens: [start, end), the negative positions that name the text's tokens; None: of all mounted texts.
    """
    layers: list[LayerState] = []
    for layer in state.layers:
        if isinstance(layer, TailState) and layer.slots is not None:
            positions = layer.slots.positions
            is_kept = positions >= 0 if tokens is None else (positions < tokens[0]) | (positions >= tokens[1])
            slots = layer.slots if bool(is_kept.all()) else layer.slots.where(is_kept)
            layers.append(layer._replace(slots=_unless_empty(slots, state.segments)))
        else:
            layers.append(layer)
    return CacheState(tuple(layers), state.segments, state.num_pinned_slots)


class Sized(Protocol):
    """A cache that can say its size."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    @property
    def kv_tokens(self) -> float: ...

    @property
    def nbytes(self) -> int: ...


def cache_repr(cache: Sized) -> str:
    """One line with what a cache holds."""
    size = f"{counted(round(cache.kv_tokens), 'slot')}, {mebibytes(cache.nbytes)}"
    segments = counted(len(cache.segments), "segment")
    return f"<{type(cache).__name__}: {counted(cache.num_tokens, 'token')} in {size}, {segments}>"


BeforeForward = Callable[[Sequence[int], int, int, str], tuple[int, list[Tensor]]]
"""Called before a model reads tokens into a cache.

Args: the tokens; how many of the last ones need logits; how many of the last ones must be read in one pass; the output
that needs this one pass, or "".
Returns: how many of the first tokens were read already, and the logits that are wanted of them, one (num_tokens,
vocab_size) tensor for each pass."""


class KVCache(WithRecurrentStates):
    """The cache of one session, usable wherever transformers takes a `Cache`.

    Args:
        kinds: what each layer caches.
        rotations: each layer's RoPE; None: slots stay at the positions at which they were written.

    Attributes:
        recurrent: the layers of recurrent states by the index of the model's layer; one with keys as well has its keys
            in `layers`.
        before_forward: set if `generate()` drives the model, to see every pass before it runs.
        copied: makes a copy that `generate()` can drive too; None: `fork` does.
        num_announced: the cache's tokens after the pass that `before_forward` has seen last.
        read_by: the library whose models read tokens into caches of this class.
        weights: the adapters that the entries depend on, as the engine describes them.
        held_rope: the engine's `HeldRope`, if the model's RoPE depends on the length of the text.
    """

    read_by = "transformers"
    layers: list[CacheLayer]  # type: ignore[assignment]

    def __init__(self, kinds: Sequence[LayerKind], rotations: Sequence[Rotation | None] | None = None) -> None:
        each = rotations or [None] * len(kinds)
        super().__init__(layers=[kind.new_layer(rotation) for kind, rotation in zip(kinds, each, strict=True)])
        beside = {index: RecurrentLayer(kind.num_states) for index, kind in enumerate(kinds) if kind.has_both}
        alone = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, RecurrentLayer)}
        self.recurrent = {**alone, **beside}
        self._parts: list[CacheLayer] = [*self.layers, *beside.values()]
        self.kinds, self.rotations = tuple(kinds), rotations
        self.segments: tuple[Segment, ...] = ()
        self.num_pinned_slots = 0
        self.before_forward: BeforeForward | None = None
        self.copied: Callable[[], KVCache] | None = None
        self.num_announced = 0
        self.weights: object = None
        self.held_rope: object = None

    def __repr__(self) -> str:
        return cache_repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        """A second cache with the same content, as `copy.deepcopy` of a DynamicCache; the model is not copied."""
        memo[id(self)] = copy = self.fork() if self.copied is None else self.copied()
        return copy

    def __reduce__(self) -> NoReturn:
        raise UnsupportedOperation(
            "a KVCache belongs to its model and cannot be pickled: save a session instead, with Memory(..., store=...) "
            "and Session.save()"
        )

    @property
    def compactable(self) -> list[CompactableLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompactableLayer)]

    @property
    def is_all_compactable(self) -> bool:
        """Whether every layer holds all keys and nothing else, so that it can be cut at any token."""
        return len(self.compactable) == len(self._parts)

    @property
    def num_tokens(self) -> int:
        """Logical length."""
        return self.get_seq_length()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Logical length: tokens that every layer has, also if a forward pass was interrupted between two layers."""
        return min(layer.get_seq_length() for layer in self.with_keys)

    @property
    def with_keys(self) -> list[CompactableLayer | SlidingLayer]:
        """The layers of attention."""
        return [layer for layer in self.layers if isinstance(layer, CompactableLayer | SlidingLayer)]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See transformers. It is called once in each pass, which `before_forward` must have seen if it is set.

        Raises:
            UnsupportedOperation: another model, or a part of the model, reads into a watched cache.
        """
        if self.before_forward is not None and self.num_announced != self.num_tokens + query_length:
            raise UnsupportedOperation(
                f"{query_length} tokens are about to be read into a cache of memory.cache() by another model than its "
                "memory's, or by a part of it: pass the cache to memory.engine.model"
            )
        return super().get_mask_sizes(query_length, layer_idx)

    @property
    def tail_start(self) -> int:
        """Where the exact tail begins."""
        return tail_start(self.segments)

    @property
    def num_exact_tokens(self) -> int:
        """Pinned tokens and those of the tail."""
        return self.num_pinned_slots + self.compactable[0].length

    @property
    def num_compact_slots(self) -> float:
        """Mean number of compact slots per KV head; pinned entries count as exact."""
        num_slots = sum(layer.slots.num_slots for layer in self.compactable if layer.slots is not None)
        return num_slots / self.num_heads - self.num_pinned_slots if num_slots else 0.0

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
        """Memory that keys, values and biases take on the device, spare capacity included."""
        return sum(tensor.nbytes for part in self._parts for tensor in part.tensors)

    @property
    def exact_nbytes(self) -> int:
        """Memory that an uncompacted cache of the same tokens would take."""
        per_token = sum(
            layer.num_heads * entries.shape[3] * entries.element_size()
            for layer in self.compactable
            if layer.buffer is not None
            for entries in (layer.buffer.key, layer.buffer.value)
        )
        others = (part for part in self._parts if not isinstance(part, CompactableLayer))
        return per_token * self.num_tokens + sum(tensor.nbytes for part in others for tensor in part.tensors)

    def state(self) -> CacheState:
        return CacheState(tuple(part.state() for part in self._parts), self.segments, self.num_pinned_slots)

    def restore(self, state: Snapshot) -> None:
        for part, part_state in zip(self._parts, state.layers, strict=True):
            part.restore(part_state)
        self.segments, self.num_pinned_slots = state.segments, state.num_pinned_slots

    def load(self, saved: Snapshot) -> None:
        """Take in a state that was saved by another process.

        Raises:
            CorruptSession: its layers are not those of this cache, a sliding window lacks tokens that the next token
                attends to, or biases have a wrong dtype.
        """
        _require_kinds(self, saved)
        self.restore(saved)
        for kind, layer in zip(self.kinds, saved.layers, strict=False):  # states beside keys come last
            if isinstance(layer, SlidingState):
                _require_window(layer, kind.window)
            elif isinstance(layer, TailState) and layer.slots is not None:
                _require_bias(layer.slots)

    def fork(self) -> KVCache:
        """A second cache with the same content, for any thread. Memory is shared until one of the two appends."""
        branch = type(self)(self.kinds, self.rotations)
        for mine, other in zip(self._parts, branch._parts, strict=True):
            other.restore(mine.state())
            if isinstance(mine, CompactableLayer) and isinstance(other, CompactableLayer):
                other.scaling, other.sinks, other.softcap = mine.scaling, mine.sinks, mine.softcap
                other.slots = other.slots and other.slots.without_derived()
                if mine.buffer is not None:
                    mine.buffer.is_shared = True
        branch.segments, branch.num_pinned_slots = self.segments, self.num_pinned_slots
        branch.weights, branch.held_rope = self.weights, self.held_rope
        return branch

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> CacheState:
        """The state after a compaction; see `am_memory.engines.base.SessionCache`."""
        slots_of_layer, (older, distances) = iter(new_slots), carried_over(self.segments, segments)
        states = tuple(
            part.compacted(older, distances, segments[-1], next(slots_of_layer), num_pinned)
            if isinstance(part, CompactableLayer)
            else part.state()
            for part in self._parts
        )
        return CacheState(states, tuple(segments), max(self.num_pinned_slots, num_pinned))

    def before(self, segment: Segment, entries: Sequence[tuple[Tensor, Tensor]]) -> CacheState:
        """The state in which a segment is the exact tail; see `am_memory.engines.base.RefinableCache`."""
        older = [held for held in self.segments if held.end <= segment.start]
        layers = zip(self.compactable, entries, strict=True)
        states = tuple(layer.before(segment, older, key, value) for layer, (key, value) in layers)
        return CacheState(states, tuple(older), self.num_pinned_slots if segment.start else 0)

    def compact_layer(self, index: int, segments: Sequence[Segment], new_slots: Slots, num_pinned: int) -> None:
        """Compact one layer in place; see `am_memory.engines.base.LayerwiseCache`."""
        layer = self.compactable[index]
        layer.restore(layer.compacted(*carried_over(self.segments, segments), segments[-1], new_slots, num_pinned))

    def reset(self) -> None:
        for part in self._parts:
            part.reset()
        self.segments, self.num_pinned_slots = (), 0

    @property
    def can_drop_tokens(self) -> bool:
        """Whether the last exact tokens can be dropped however long the text is."""
        return self.is_all_compactable

    @property
    def is_croppable(self) -> bool:
        """Whether the last exact tokens can be dropped; full sliding windows and recurrent states cannot go back."""
        return all(part.is_croppable for part in self._parts)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, in all layers or in none."""
        if tokens_to_remove and not self.is_croppable:
            raise UnsupportedOperation(
                f"cannot remove {-tokens_to_remove} tokens from the cache: a sliding window has forgotten what came "
                "before them, or a recurrent state has seen them; use Session.rewind, which rebuilds"
            )
        super().crop(tokens_to_remove)

    @property
    def is_whole(self) -> bool:
        """Whether all layers have the same tokens; after an interrupted forward pass the first layers have more."""
        return len({layer.get_seq_length() for layer in self.with_keys}) == 1

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` logical tokens; what is forgotten must be in the exact tail."""
        self.crop(num_tokens - self.num_tokens)


def _require_kinds(cache: KVCache, saved: Snapshot) -> None:
    kinds, own = ([type(layer) for layer in state.layers] for state in (saved, cache.state()))
    if kinds != own:
        raise CorruptSession(
            f"a cache of {len(kinds)} layers, {kinds.count(SlidingState)} of them sliding windows, is not one of this "
            f"model's {len(own)}"
        )


def _require_window(state: SlidingState, window: int | None) -> None:
    if state.keys is not None and window is not None:
        held, seen = state.keys.shape[2], min(state.num_tokens, window - 1)
        if held != seen:
            raise CorruptSession(f"a sliding window holds {held} tokens, of which the next one sees {seen}")


def _require_bias(slots: Slots) -> None:
    """Attention adds biases to scores as it computes them, so they have the dtype of the keys."""
    key = slots.key.exact if isinstance(slots.key, Quantised) else slots.key
    if slots.bias.dtype != key.dtype:
        raise CorruptSession(f"it has biases of {slots.bias.dtype}")
