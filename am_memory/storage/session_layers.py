"""The layers of a saved cache as named tensors, and the checks when they are read. Knows no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import NOT_CODED, Quantised, Rows, tensors
from am_memory.kv_cache.layers import LayerState, RecurrentState, SlidingState, TailBuffer, TailState
from am_memory.kv_cache.slots import PINNED_RANK, Segment, Slots

SLOT_FIELDS = ("key", "value", "bias", "positions", "ranks")
MAX_STATES = 16
"""The most states of each sort that a layer may have; models have one."""
STATE_FIELDS = ("conv", "recurrent")
QUANTISED_FIELDS = ("codes", "scale", "exact", "group")


def packed_layer(layer: LayerState) -> dict[str, Tensor | None]:
    """The tensors of a layer by name, without spare capacity."""
    if isinstance(layer, SlidingState):
        return {"key": layer.keys, "value": layer.values}
    if isinstance(layer, RecurrentState):
        sorts = zip(STATE_FIELDS, layer, strict=True)
        return {f"{sort}.{index}": tensor for sort, states in sorts for index, tensor in enumerate(states)}
    parts: dict[str, Tensor | None] = {}
    if layer.buffer is not None:
        parts["key"] = layer.buffer.key[:, :, : layer.length]
        parts["value"] = layer.buffer.value[:, :, : layer.length]
    if layer.slots is not None:
        parts.update(packed_slots(layer.slots))
    return parts


def packed_slots(slots: Slots) -> dict[str, Tensor]:
    """The tensors of slots by name."""
    parts: dict[str, Tensor] = {}
    for name, field in zip(SLOT_FIELDS, slots.fields, strict=True):
        if isinstance(field, Quantised):
            parts.update({f"slots.{name}.{part}": getattr(field, part) for part in QUANTISED_FIELDS})
        else:
            parts[f"slots.{name}"] = field
    return {**parts, "slots.cu_slots": torch.tensor(slots.cu_slots)}


def parts_of_layers(tensors: Mapping[str, Tensor], num_layers: int) -> list[dict[str, Tensor]]:
    """The tensors of each layer by the rest of their names: "layers.3.slots.key" is the part "slots.key" of layer 3.

    Raises:
        ValueError: a name is of another form, or of another layer.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for name, tensor in tensors.items():
        _, index, part = name.split(".", 2)
        require(0 <= int(index) < num_layers, f"{name} is of none of its {num_layers} layers")
        parts[int(index)][part] = tensor
    return parts


def unpacked_layer(
    parts: dict[str, Tensor], window_tokens: int | None, tail_start: int, device: torch.device
) -> LayerState:
    """The inverse of `packed_layer`.

    Args:
        window_tokens: the number of tokens that a sliding window has seen; None for full attention.
        tail_start: the first token of the exact tail.

    Raises:
        KeyError, ValueError: the tensors cannot be those of a layer.
    """
    if not parts:
        return TailState(None, None, 0, 0) if window_tokens is None else SlidingState(None, None, 0)
    key, value = parts["key"], parts["value"]
    is_pair = key.ndim == value.ndim == 4 and key.shape[:3] == value.shape[:3] and key.shape[0] == 1
    is_pair = is_pair and key.dtype == value.dtype and key.is_floating_point() and key.shape[1] > 0
    require(is_pair, f"keys {key.dtype} {tuple(key.shape)}, values {value.dtype} {tuple(value.shape)}")
    if window_tokens is not None:
        require(key.shape[2] <= window_tokens, f"a sliding window holds {key.shape[2]} of {window_tokens} tokens")
        return SlidingState(key.to(device), value.to(device), window_tokens)
    has_slots = any(name.startswith("slots.") for name in parts)
    require(has_slots == bool(tail_start), f"a tail begins at {tail_start}, {'with' if has_slots else 'without'} slots")
    slots = unpacked_slots(parts, key.shape[1], tail_start).to(device) if has_slots else None
    return TailState(slots, TailBuffer(key.to(device), value.to(device)), tail_start, key.shape[2])


def unpacked_states(parts: dict[str, Tensor], num_states: int, device: torch.device) -> RecurrentState:
    """The inverse of `packed_layer` for a layer of recurrent states.

    Raises:
        ValueError: there are tensors of other names, or some that are no states.
    """
    held = {name: tensor.to(device) for name, tensor in parts.items()}
    require(all(tensor.is_floating_point() for tensor in held.values()), "a recurrent state has another dtype")
    states = (tuple(held.pop(f"{sort}.{index}", None) for index in range(num_states)) for sort in STATE_FIELDS)
    state = RecurrentState(*states)
    require(not held, f"a recurrent state has parts {', '.join(held)}")
    return state


def unpacked_slots(parts: dict[str, Tensor], num_heads: int, num_tokens: int) -> Slots:
    """The inverse of `packed_slots`.

    Args:
        num_tokens: all slots are of the first `num_tokens` tokens.

    Raises:
        KeyError, ValueError: the tensors cannot be those of slots.
    """
    fields: dict[str, Any] = {name: _slot_field(parts, f"slots.{name}") for name in SLOT_FIELDS}
    cu_slots, positions, ranks, bias = parts["slots.cu_slots"], fields["positions"], fields["ranks"], fields["bias"]
    is_typed = (
        cu_slots.dtype == torch.int64
        and positions.dtype == ranks.dtype == torch.int32
        and cu_slots.ndim == positions.ndim == ranks.ndim == bias.ndim == 1
        and bias.is_floating_point()
        and all(tensor.ndim == 2 for rows in (fields["key"], fields["value"]) for tensor in tensors(rows))
    )
    require(is_typed, "slots have another dtype or shape")
    bounds, sizes = cu_slots.tolist(), {len(field) for field in fields.values()}
    is_ascending = bounds == sorted(bounds) and len(bounds) == num_heads + 1 and bounds[0] == 0
    require(is_ascending and sizes == {bounds[-1]}, f"slots {bounds} in tensors of {sizes} rows")
    is_placed = bool(((positions >= 0) & (positions < num_tokens) & (ranks >= PINNED_RANK)).all())
    require(is_placed, f"slots at positions outside the {num_tokens} compacted tokens")
    return Slots(**fields, cu_slots=tuple(bounds))


def _slot_field(parts: dict[str, Tensor], name: str) -> Rows:
    if name in parts:
        return parts[name]
    rows = Quantised(*(parts[f"{name}.{part}"] for part in QUANTISED_FIELDS))
    is_typed = rows.codes.dtype == torch.int8 and rows.scale.dtype == torch.float32 and rows.group.dtype == torch.int64
    is_typed = is_typed and rows.exact.is_floating_point() and rows.group.ndim == 1
    require(is_typed and all(tensor.ndim == 2 for tensor in rows.tensors), "int8 slots have another dtype or shape")
    coded = rows.group[rows.group != NOT_CODED]
    sizes, widths = [len(tensor) for tensor in rows.tensors], {tensor.shape[1] for tensor in rows.tensors}
    groups = torch.unique_consecutive(coded).tolist()
    is_whole = sizes == [len(coded), len(groups), len(rows) - len(coded)] and len(widths) == 1
    require(
        is_whole and groups == list(range(len(groups))),
        f"{len(coded)} of {len(rows)} rows are int8, in tensors of {sizes} rows",
    )
    return rows


def require_segments(segments: Sequence[Segment], num_tokens: int) -> None:
    """Raise ValueError unless the segments follow each other within `num_tokens` tokens."""
    for segment in segments:
        is_segment = 0 <= segment.start < segment.end <= num_tokens and segment.num_slots >= 0
        require(is_segment and 0 <= segment.shift <= num_tokens, f"{segment} among {num_tokens} tokens")
    is_in_order = all(one.end <= other.start for one, other in pairwise(segments))
    require(is_in_order, "segments overlap, or are not in order")


def require(is_so: bool, otherwise: str) -> None:
    """Raise ValueError with the message `otherwise`, unless the condition holds."""
    if not is_so:
        raise ValueError(otherwise)
