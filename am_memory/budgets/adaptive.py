"""The adaptive budget: slots go to the highest scores over all layers and heads. It needs no calibration."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_ranks(scores: Tensor, min_slots: int) -> Tensor:
    """Rank the slots of all heads by the score of the key that each would hold.

    Args:
        scores: (num_heads, seq_len), scores of all keys, for the KV heads of all layers.
        min_slots: each head gets its first `min_slots` before any head gets more.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h. Ascending along k.
    """
    ordered = scores.float().sort(dim=1, descending=True).values
    ordered[:, :min_slots] += 1 + ordered.max()
    order = ordered.flatten().sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(order.numel(), device=order.device)
    return ranks.view(scores.shape)
