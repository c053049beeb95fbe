"""A slot of every head at once, where a cache has cells that all heads share: no head can have more than another."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_ranks(scores: Tensor) -> Tensor:
    """Heads get their k-th slots together, once there is one for each.

    Args:
        scores: (num_heads, seq_len); only the shape counts.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the last head's k-th slot.
    """
    num_heads, seq_len = scores.shape
    return (torch.arange(1, seq_len + 1, device=scores.device) * num_heads - 1).expand(num_heads, -1)
