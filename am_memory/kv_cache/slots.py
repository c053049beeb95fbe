"""Compact slots, ragged over the heads of a layer, and the segments of tokens that they stand for.

Slots are immutable: snapshots and forks share them. Knows no model, no policy, and not how slots are computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Quantised, Rows, cat, decoded, tensors
from am_memory.kv_cache.rotation import Rotation

PINNED_RANK = -1
"""The rank of a pinned entry, which no budget cuts."""
MOUNTED_RANK = -2
"""The rank of a mounted text's slots, which no budget cuts either. Their positions are negative: no token has them."""


@dataclass(frozen=True)
class Segment:
    """The logical tokens [start, end), held in `num_slots` slots over all layers and KV heads.

    Slots are ranked when the segment is made. Shrinking it drops the slots of rank >= num_slots, so that the result
    depends on the size alone and not on the steps in between.

    Attributes:
        shift: by how many positions its keys were rotated since they were written.
    """

    start: int
    end: int
    num_slots: int
    shift: int = 0

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


def tail_start(segments: Sequence[Segment]) -> int:
    """Where the exact tail begins behind these segments: what comes before it is compact, or pinned."""
    return segments[-1].end if segments else 0


def resized(segment: Segment, num_slots: int) -> Segment:
    """The same tokens in fewer slots."""
    return replace(segment, num_slots=min(num_slots, segment.num_slots))


def carried_over(held: Sequence[Segment], segments: Sequence[Segment]) -> tuple[list[Segment], list[int]]:
    """The segments that a cache holds, as they are after a compaction.

    Args:
        held: before the compaction.
        segments: after it, the new one last.

    Returns:
        Each held segment as it is among `segments`, or with 0 slots if it is not there; and by how many positions each
        of them is rotated.
    """
    kept = {segment.start: segment for segment in segments[:-1]}
    older = [kept.get(segment.start, replace(segment, num_slots=0)) for segment in held]
    return older, [after.shift - before.shift for before, after in zip(held, older, strict=True)]


class HeadSlots(NamedTuple):
    """Views of one KV head's slots, which broadcast against (batch, heads, queries, head_dim)."""

    key: Tensor  # (1, 1, num_slots, head_dim)
    value: Tensor  # (1, 1, num_slots, value_dim)
    bias: Tensor  # (1, 1, 1, num_slots)


@dataclass(frozen=True)
class Slots:
    """The compact entries of one layer, ragged over its KV heads; immutable, so forks share them.

    Attributes:
        key, value: (total_slots, head_dim) and (total_slots, value_dim), head after head; within a head in the order of
            the tokens. `Quantised` if segments are kept in int8; pinned and recalled entries in them keep the model's
            dtype.
        bias: (total_slots,), the log of the number of exact entries that a slot stands for; 0 for pinned entries.
        positions: (total_slots,) int32 in host memory, the logical position at which a slot's key was written; it names
            the slot. Those of mounted texts are negative.
        ranks: (total_slots,) int32 in host memory, the slot's rank in its segment when that was made, `PINNED_RANK` or
            `MOUNTED_RANK`. Attention does not need it: cutting never waits for the device.
        cu_slots: the first slot of each head, and the end: num_key_value_heads + 1 numbers.
    """

    key: Rows
    value: Rows
    bias: Tensor
    positions: Tensor
    ranks: Tensor
    cu_slots: tuple[int, ...]

    @classmethod
    def exact(cls, key: Tensor, value: Tensor, start: int) -> Slots:
        """Pinned entries, unchanged; key and value: (num_key_value_heads, seq_len, head_dim or value_dim)."""
        num_heads, seq_len = key.shape[:2]
        positions = torch.arange(start, start + seq_len, dtype=torch.int32)
        return cls(
            key=key.reshape(-1, key.shape[2]).clone(),
            value=value.reshape(-1, value.shape[2]).clone(),
            bias=key.new_zeros(num_heads * seq_len),
            positions=positions.repeat(num_heads),
            ranks=torch.full_like(positions, PINNED_RANK).repeat(num_heads),
            cu_slots=tuple(range(0, num_heads * seq_len + 1, seq_len)) if seq_len else (0,) * (num_heads + 1),
        )

    @classmethod
    def recalled(cls, key: Tensor, value: Tensor, start: int, bias: float = 0.0) -> Slots:
        """A segment's original entries, all of rank 0 and of one bias; shapes as in `exact`."""
        exact = cls.exact(key, value, start)
        return replace(exact, ranks=torch.zeros_like(exact.ranks), bias=exact.bias + bias)

    @classmethod
    def concat(cls, parts: Sequence[Slots]) -> Slots:
        """One part after another in each head; the parts must be in the order of their tokens."""
        num_heads = parts[0].num_heads
        stacked = cls.stack([part.head(head) for head in range(num_heads) for part in parts])
        return replace(stacked, cu_slots=stacked.cu_slots[:: len(parts)])

    def head(self, index: int) -> Slots:
        """One head's slots, as a layer of one head; views, except of int8 rows."""
        where = slice(self.cu_slots[index], self.cu_slots[index + 1])
        return self._of((field[where] for field in self.fields), (0, where.stop - where.start))

    @classmethod
    def stack(cls, heads: Sequence[Slots]) -> Slots:
        """One layer from its heads, each given as a layer of one head."""
        fields = (cat(field) for field in zip(*(head.fields for head in heads), strict=True))
        return cls._of(fields, (0, *itertools.accumulate(head.num_slots for head in heads)))

    @classmethod
    def _of(cls, fields: Iterable[Any], cu_slots: tuple[int, ...]) -> Slots:
        key, value, bias, positions, ranks = fields
        return cls(key, value, bias, positions, ranks, cu_slots)

    def to(self, device: torch.device | str) -> Slots:
        """The same slots, with the tensors that attention needs on a device."""
        return replace(self, key=self.key.to(device), value=self.value.to(device), bias=self.bias.to(device))

    def quantised(self) -> Slots:
        """One head's slots with keys and values in int8."""
        assert self.num_heads == 1
        return replace(self, key=Quantised.of(decoded(self.key)), value=Quantised.of(decoded(self.value)))

    def decoded(self) -> Slots:
        """The same slots with keys and values in the model's dtype, for attention."""
        if isinstance(self.key, Tensor):
            return self
        return replace(self, key=decoded(self.key), value=decoded(self.value))

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, biases and positions of all heads, each as long as the longest one.

        Returns:
            key, value: (num_heads, longest, head_dim or value_dim), in the model's dtype.
            bias: (num_heads, longest); -inf marks padding.
            positions: (num_heads, longest) int32 in host memory.
        """
        heads = [self.head(index) for index in range(self.num_heads)]

        def pad(pieces: list[Tensor], fill: float) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=fill).to(pieces[0].dtype)

        return (
            pad([decoded(head.key) for head in heads], 0),
            pad([decoded(head.value) for head in heads], 0),
            pad([head.bias for head in heads], -torch.inf),
            pad([head.positions for head in heads], 0),
        )

    def within(self, start: int, end: int) -> Slots:
        """The slots of the tokens at [start, end), without pinned ones."""
        keep = (self.positions >= start) & (self.positions < end) & (self.ranks != PINNED_RANK)
        return self.where(keep)

    def mounted(self, first: int) -> Slots:
        """The same slots as those of a mounted text.

        Args:
            first: the negative position that names the text's first token; the slots count from 0.
        """
        ranks = torch.full_like(self.ranks, MOUNTED_RANK)
        return replace(self, positions=self.positions + first, ranks=ranks)

    def with_key(self, key: Tensor) -> Slots:
        """The same slots with other keys, (total_slots, head_dim), in int8 where the keys were."""
        return replace(self, key=self.key.recoded(key) if isinstance(self.key, Quantised) else key)

    def without_derived(self) -> Slots:
        """The same tensors, without the cached properties: these are ready only in the stream that made them."""
        key, value = (replace(rows) if isinstance(rows, Quantised) else rows for rows in (self.key, self.value))
        return replace(self, key=key, value=value)

    def where(self, keep: Tensor) -> Slots:
        """The slots for which `keep`, (total_slots,) bool in host memory, is true."""
        kept_before = [0, *keep.cumsum(0).tolist()]
        cu_slots = tuple(kept_before[start] for start in self.cu_slots)
        kept = keep.nonzero()[:, 0]
        fields = (field[kept if isinstance(field, Quantised) else kept.to(field.device)] for field in self.fields)
        return self._of(fields, cu_slots)

    def cut(self, segments: Sequence[Segment]) -> Slots:
        """Drop the slots that no longer fit in their segment's `num_slots`.

        Args:
            segments: all segments of the slots, in the order of their tokens.
        """
        if not segments:
            return self
        limits = self.ranks.new_tensor([segment.num_slots for segment in segments])
        keep = self.ranks < limits[self._segment_indices(segments)]  # ranks below 0 are below any limit
        return self if bool(keep.all()) else self.where(keep)

    def rotated(self, rotation: Rotation, segments: Sequence[Segment], distances: Sequence[int]) -> Slots:
        """The slots with the keys of each segment rotated; pinned keys rotate with the oldest one, mounted keys stay.

        Args:
            segments: all segments of the slots, in the order of their tokens.
            distances: for each segment, in positions.
        """
        if not any(distances):
            return self
        distance = torch.tensor(distances)[self._segment_indices(segments)]
        distance[self.positions < 0] = 0
        return self.with_key(rotation.rotated(decoded(self.key), distance))

    def _segment_indices(self, segments: Sequence[Segment]) -> Tensor:
        """The index of each slot's segment, (total_slots,); pinned and mounted slots count to the first segment."""
        starts = self.positions.new_tensor([segment.start for segment in segments])
        return (torch.searchsorted(starts, self.positions, right=True) - 1).clamp_min(0)

    @property
    def fields(self) -> tuple[Rows, ...]:
        return self.key, self.value, self.bias, self.positions, self.ranks

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that attention needs, on the device: key, value and bias if nothing is in int8."""
        return *tensors(self.key), *tensors(self.value), self.bias

    @cached_property
    def heads(self) -> tuple[HeadSlots, ...]:
        """Each head's slots; only if nothing is in int8."""
        key, value, bias = self.tensors
        return tuple(
            HeadSlots(key[None, None, begin:end], value[None, None, begin:end], bias[None, None, None, begin:end])
            for begin, end in itertools.pairwise(self.cu_slots)
        )

    @property
    def num_slots(self) -> int:
        """Over all heads of the layer."""
        return self.cu_slots[-1]

    @property
    def num_heads(self) -> int:
        return len(self.cu_slots) - 1

    @cached_property
    def longest(self) -> int:
        """The number of slots of the head with the most."""
        return max(end - begin for begin, end in itertools.pairwise(self.cu_slots))

    @cached_property
    def cu_slots_tensor(self) -> Tensor:
        """`cu_slots` as an int32 tensor on the device, for kernels."""
        return torch.tensor(self.cu_slots, dtype=torch.int32).to(self.bias.device, non_blocking=True)
