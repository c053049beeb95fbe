"""The uniform budget: the same number of slots for every head, as in the paper's baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_ranks(scores: Tensor, min_slots: int) -> Tensor:
    """Rank the slots so that heads take turns.

    Args:
        scores: (num_heads, seq_len); only the shape counts.
        min_slots: has no effect, because no head gets fewer slots than another.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h.
    """
    num_heads, seq_len = scores.shape
    return torch.arange(num_heads * seq_len, device=scores.device).view(seq_len, num_heads).T
