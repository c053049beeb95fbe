"""The biases of the kept keys: bounded least squares on the block's attention mass (arXiv:2602.16284, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.exact import ExactAttention
from am_memory.solver.gram import NormalEquations, add_ridge, damped_cholesky, without_padding
from am_memory.solver.nnls import bounded_least_squares


def solve_bias(
    block: Block,
    key: Tensor,
    inherited: Tensor,
    exact: ExactAttention,
    bounds: tuple[float, float],
    ridge: float,
    is_relative: bool,
) -> Tensor:
    """Logarithm of the w within [e^low, e^high] that minimises ||A w - b||^2 + ridge * mean(diag(A^T A)) * ||w - 1||^2.

    A holds exp(logit - shift) of each query on the kept keys, b the sum of exp(logit - shift) over the whole block.
    With the query's log mass as shift, b is 1, the error of the mass is relative and every query counts alike; with
    its largest logit, as in the paper, queries of diffuse attention (large b) count more. Where the system is singular,
    the solution nearest to w = 1 (no bias) is taken.

    Args:
        block: the exact block.
        key: (B, t, head_dim) float32, the kept keys; in padding any key of the block.
        inherited: (B, t) float32, the biases that the kept keys have already, -inf in padding.
        exact: the block's own attention.
        bounds: of the bias, with low <= 0 <= high.
        ridge: pull toward no bias, relative to the mean diagonal of A^T A; 0 in the paper.
        is_relative: shift by the log mass.

    Returns:
        (B, t) float32, to be added to what is inherited; 0 in padding.
    """
    is_slot = inherited > -torch.inf
    system = _mass_system(block, key, inherited, exact, is_relative)
    gram = add_ridge(without_padding(system.gram, is_slot), is_slot, ridge)
    low, high = (math.expm1(bound) for bound in bounds)
    change = bounded_least_squares(damped_cholesky(gram)[0], system.target[:, :, 0], low, high)
    return torch.where(is_slot, torch.log1p(change).float(), 0.0)


def _mass_system(
    block: Block, key: Tensor, inherited: Tensor, exact: ExactAttention, is_relative: bool
) -> NormalEquations:
    """Normal equations of A (w - 1) = b - A 1: keeping every key leaves no mass to explain, and hence no bias."""
    shift = exact.log_mass if is_relative else exact.max_logit
    mass = ((exact.log_mass - shift).exp() * exact.weight)[:, :, None]  # (B, num_queries, 1)
    base2_shift = (shift * LOG2_E - exact.weight.log2())[:, :, None]
    system = NormalEquations(block.num_heads, key.shape[1], 1, key.device)
    for rows, feature in block.base2_logits(key, inherited):
        feature.sub_(base2_shift[:, rows]).exp2_()  # (B, chunk, t)
        system.add(feature, mass[:, rows] - feature.sum(2, keepdim=True))
    return system
