"""The same number of slots for every head: the paper's baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_ranks(scores: Tensor, min_slots: int) -> Tensor:
    """Heads take turns; `min_slots` is met by itself.

    Args:
        scores: (num_heads, seq_len); only the shape counts.
        min_slots: unused by nature: equal shares have no poorest head.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h.
    """
    num_heads, seq_len = scores.shape
    return torch.arange(num_heads * seq_len, device=scores.device).view(seq_len, num_heads).T
