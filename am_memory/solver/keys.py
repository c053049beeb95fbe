"""Key selection: the scores of all keys, the protocol of a selection, and the selection by highest attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from am_memory.solver.block import Block, slot_mask
from am_memory.solver.exact import exact_attention


def attention_scores(block: Block) -> Tensor:
    """Root mean square over the reference queries of the attention that each key gets (arXiv:2602.16284, section 3.2).

    Returns:
        (B, seq_len) float32.
    """
    return exact_attention(block).scores


@runtime_checkable
class KeySelection(Protocol):
    """Chooses the keys that a compact block keeps. CONTRIBUTING.md says how to add one."""

    @property
    def name(self) -> str: ...

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        """Choose num_slots[b] keys of each head b.

        Args:
            block: the block to compact.
            scores: (B, seq_len), from `attention_scores`.
            num_slots: (B,) int64, each at most seq_len.

        Returns:
            (B, max(num_slots)) int64. The first num_slots[b] entries of row b are distinct key indices, the most
            important first; the rest is padding and is not read.
        """
        ...


@dataclass(frozen=True)
class HighestAttention:
    """Keeps the keys of the highest score (arXiv:2602.16284, section 3.2); of equal scores the lower index."""

    name: str = "highest_attention"

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        ranking = torch.sort(scores, dim=1, descending=True, stable=True).indices
        return repeat_first_in_padding(ranking[:, : int(num_slots.max())], num_slots)


def repeat_first_in_padding(indices: Tensor, num_slots: Tensor) -> Tensor:
    """(B, t): the indices, with the first one of each row in its padding (from num_slots[b] on)."""
    return torch.where(slot_mask(num_slots, indices.shape[1]), indices, indices[:, :1])
