"""The head budget that a policy names."""

from __future__ import annotations

from torch import Tensor

from am_memory.budgets.adaptive import adaptive_ranks
from am_memory.budgets.calibrated import Calibration, calibrated_ranks
from am_memory.budgets.shared import shared_ranks
from am_memory.budgets.uniform import uniform_ranks
from am_memory.policy import MemoryPolicy


def head_ranks(
    scores: Tensor, policy: MemoryPolicy, calibration: Calibration | None = None, *, is_shared: bool = False
) -> Tensor:
    """Rank the slots of all heads by the policy's `head_budget`.

    Args:
        scores: (num_heads, seq_len), scores of all keys, for the KV heads of all layers.
        calibration: sensitivity curves of the model, if the budget uses them; see `calibration_for`.
        is_shared: every slot is shared by all heads, so that no head can have more than another.

    Returns:
        (num_heads, seq_len) int64; entry [h, k] is the rank of the k-th slot of head h. Ascending along k.
    """
    min_slots = policy.experiments.min_slots
    if is_shared:
        return shared_ranks(scores)
    if policy.head_budget == "uniform":
        return uniform_ranks(scores, min_slots)
    if calibration is not None:
        return calibrated_ranks(calibration, scores, min_slots)
    return adaptive_ranks(scores, min_slots)
