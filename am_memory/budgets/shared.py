"""The budget of caches whose cells all heads share: every head has the same number of slots."""

from __future__ import annotations

import torch
from torch import Tensor


def shared_ranks(scores: Tensor) -> Tensor:
    """Rank the slots so that all heads get their k-th slot at once.

    Args:
        scores: (num_heads, seq_len); only the shape counts.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of the last head, for every h.
    """
    num_heads, seq_len = scores.shape
    return (torch.arange(1, seq_len + 1, device=scores.device) * num_heads - 1).expand(num_heads, -1)
