"""Keys or values stored in int8, with a scale for each channel of a group; some rows may stay unquantised.

Scales are per channel and not per row. Some models have key channels that are a hundred times larger than others; a
scale for the whole row would round the others to zero (docs/log.md). Knows no slots, no model and no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

LARGEST = 127
NOT_CODED = -1
"""The group of an unquantised row."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """(num_rows, head_dim) numbers, most of them in int8; immutable.

    Attributes:
        codes: (num_coded, head_dim) int8; a row is its codes times the scale of its group.
        scale: (num_groups, head_dim) float32: the largest magnitude of a channel in the group, divided by 127.
        exact: (num_rows - num_coded, head_dim), the unquantised rows, in the dtype that all rows are decoded to.
        group: (num_rows,) int64 in host memory, ascending over the quantised rows; `NOT_CODED` for the others.
    """

    codes: Tensor
    scale: Tensor
    exact: Tensor
    group: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Quantised:
        """Quantise (num_rows, head_dim) finite numbers as one group, unless its scale takes more than codes save."""
        if len(rows) * (rows.element_size() - 1) <= torch.float32.itemsize:
            return cls.unchanged(rows)
        return cls(
            *_coded(rows, rows.new_zeros(len(rows), dtype=torch.int64), 1), rows[:0], torch.zeros(len(rows)).long()
        )

    @classmethod
    def unchanged(cls, rows: Tensor) -> Quantised:
        """All rows unquantised."""
        group = torch.full((len(rows),), NOT_CODED)
        return cls(rows[:0].to(torch.int8), rows[:0].float(), rows, group)

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, where: slice | Tensor) -> Quantised:
        """Some of the rows; an index tensor must be in host memory."""
        row, group = self._row_in_kind[where], self.group[where].clone()
        is_coded = group != NOT_CODED
        kept, group[is_coded] = torch.unique_consecutive(group[is_coded], return_inverse=True)
        coded, exact, kept = (index.to(self.codes.device) for index in (row[is_coded], row[~is_coded], kept))
        return Quantised(self.codes[coded], self.scale[kept], self.exact[exact], group)

    def recoded(self, rows: Tensor) -> Quantised:
        """Other numbers, (num_rows, head_dim), in the same groups."""
        is_coded = (self.group != NOT_CODED).to(rows.device)
        group = self.group[self.group != NOT_CODED].to(rows.device)
        return Quantised(*_coded(rows[is_coded], group, len(self.scale)), rows[~is_coded], self.group)

    def to(self, device: torch.device | str) -> Quantised:
        codes, scale, exact = (tensor.to(device) for tensor in self.tensors)
        return replace(self, codes=codes, scale=scale, exact=exact)

    def decoded(self) -> Tensor:
        """All rows, (num_rows, head_dim); does not wait for the device."""
        scale = self.scale.repeat_interleave(self._group_sizes, dim=0, output_size=len(self.codes))
        coded = (self.codes * scale).to(self.exact.dtype)
        pieces = ((coded if is_coded else self.exact)[where] for is_coded, where in self._runs)
        return torch.cat([self.exact[:0], *pieces])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors on the device."""
        return self.codes, self.scale, self.exact

    @cached_property
    def index(self) -> tuple[Tensor, Tensor]:
        """Each row's group, and its row in `codes` or `exact`: (num_rows,) int32 each, in the device's memory."""
        group, row = (index.int().to(self.codes.device, non_blocking=True) for index in (self.group, self._row_in_kind))
        return group, row

    @cached_property
    def _row_in_kind(self) -> Tensor:
        """(num_rows,) int64: a row's index in `codes`, or in `exact`."""
        is_coded = self.group != NOT_CODED
        return torch.where(is_coded, is_coded.cumsum(0), (~is_coded).cumsum(0)) - 1

    @cached_property
    def _runs(self) -> list[tuple[bool, slice]]:
        """Consecutive rows of one kind: whether they are quantised, and their slice of `codes` or `exact`."""
        kinds, counts = torch.unique_consecutive(self.group != NOT_CODED, return_counts=True)
        first = self._row_in_kind[counts.cumsum(0) - counts]
        runs = zip(kinds.tolist(), first.tolist(), counts.tolist(), strict=True)
        return [(is_coded, slice(start, start + count)) for is_coded, start, count in runs]

    @cached_property
    def _group_sizes(self) -> Tensor:
        """The number of rows in each group, (num_groups,) int64 on the device."""
        return self.group[self.group != NOT_CODED].bincount(minlength=len(self.scale)).to(self.codes.device)


def _coded(rows: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The codes of rows, and the scales of their groups."""
    numbers = rows.float()
    index = group[:, None].expand_as(numbers)
    largest = numbers.new_zeros(num_groups, rows.shape[1]).scatter_reduce(0, index, numbers.abs(), "amax")
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (numbers / scale[group]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


Rows: TypeAlias = Tensor | Quantised
"""(num_rows, head_dim) keys or values, quantised or not."""


def decoded(rows: Rows) -> Tensor:
    """The rows in the model's dtype."""
    return rows.decoded() if isinstance(rows, Quantised) else rows


def tensors(rows: Rows) -> tuple[Tensor, ...]:
    """The tensors of the rows on the device."""
    return rows.tensors if isinstance(rows, Quantised) else (rows,)


def cat(parts: Sequence[Rows]) -> Rows:
    """Concatenate rows; a plain tensor if all parts are plain."""
    plain = [part for part in parts if isinstance(part, Tensor)]
    if len(plain) == len(parts):
        return torch.cat(plain)
    held = [part if isinstance(part, Quantised) else Quantised.unchanged(part) for part in parts]
    groups, num_groups = [], 0
    for part in held:
        groups.append(torch.where(part.group == NOT_CODED, NOT_CODED, part.group + num_groups))
        num_groups += len(part.scale)
    codes, scale, exact = (torch.cat(pieces) for pieces in zip(*(part.tensors for part in held), strict=True))
    return Quantised(codes, scale, exact, torch.cat(groups))
