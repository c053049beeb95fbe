"""The values of the kept keys: ridge regression on the block's attention output (arXiv:2602.16284, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.exact import ExactAttention
from am_memory.solver.gram import NormalEquations, add_ridge, damped_cholesky, without_padding


@dataclass(frozen=True)
class CompactAttention:
    """Attention of the reference queries to the kept keys with their original values, compared with the exact one.

    X are the softmax weights on the kept keys, V their values, and Y the exact output.

    Attributes:
        system: X^T X and X^T (Y - X V).
        missing_energy: (B,) float64, ||Y - X V||^2.
        mass_error: (B,) float32, RMS over queries of (compact mass / exact mass - 1).
    """

    system: NormalEquations
    missing_energy: Tensor
    mass_error: Tensor


def compact_attention(
    block: Block, key: Tensor, bias: Tensor, value: Tensor, exact: ExactAttention
) -> CompactAttention:
    """Attend to the kept keys, in one pass over the queries.

    Args:
        block: the exact block.
        key: (B, t, head_dim) float32, kept keys; any finite ones in padding.
        value: (B, t, value_dim) float32, their original values; likewise.
        bias: (B, t) float32, -inf in padding.
        exact: the block's own attention.
    """
    system = NormalEquations(block.num_heads, key.shape[1], block.value_dim, key.device)
    missing_energy = torch.zeros(block.num_heads, dtype=torch.float64, device=key.device)
    mass_energy = torch.zeros_like(missing_energy)
    finite = torch.finfo(torch.float32)
    for rows, weight in block.base2_logits(key, bias):  # (B, chunk, t)
        # The clamps are for heads without slots: all their logits are -inf, and all weights become 0.
        top = weight.amax(2, keepdim=True).clamp_min_(finite.min)
        total = weight.sub_(top).exp2_().sum(2, keepdim=True)
        mass_ratio = total * (top - exact.log_mass[:, rows, None] * LOG2_E).exp2_()
        counts = exact.weight[:, rows, None]
        mass_energy += (mass_ratio - 1).mul_(counts).square_().sum((1, 2))
        weight.mul_(counts / total.clamp_min_(finite.tiny))
        missing = torch.baddbmm(counts * exact.output[:, rows], weight, value, alpha=-1)
        missing_energy += missing.square().sum((1, 2))
        system.add(weight, missing)
    return CompactAttention(
        system, missing_energy, (mass_energy / exact.weight.square().sum(1).clamp_min(finite.tiny)).sqrt().float()
    )


def solve_values(attention: CompactAttention, is_slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The change D of the values that minimises ||X D - (Y - X V)||^2 + ridge * mean(diag(X^T X)) * ||D||^2.

    The paper's least squares is often rank-deficient. The ridge pulls the values toward the originals.

    Args:
        attention: of the kept keys.
        is_slot: (B, t) bool, False in padding.
        ridge: relative to the mean diagonal of X^T X.

    Returns:
        D, (B, t, value_dim) float64, 0 in padding; and the error that is left, ||Y - X (V + D)||^2, (B,) float64.
    """
    gram = without_padding(attention.system.gram, is_slot)
    target = attention.system.target  # 0 in padding, as the weights are
    _, factor = damped_cholesky(add_ridge(gram, is_slot, ridge))
    change = torch.cholesky_solve(target, factor)
    left = attention.missing_energy + ((torch.bmm(gram, change) - 2 * target) * change).sum((1, 2))
    return change, left.clamp_min_(0.0)
