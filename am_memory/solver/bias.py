"""The biases of the kept keys: bounded least squares on the attention mass (arXiv:2602.16284, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.exact import ExactAttention
from am_memory.solver.gram import NormalEquations, add_ridge, damped_cholesky, without_padding
from am_memory.solver.nnls import bounded_least_squares
from am_memory.solver.options import FitOptions


def solve_bias(block: Block, key: Tensor, inherited: Tensor, exact: ExactAttention, options: FitOptions) -> Tensor:
    """Logarithm of the w within [e^low, e^high] that minimises ||A w - b||^2 + ridge * mean(diag(A^T A)) * ||w - 1||^2.

    A holds exp(logit - shift) of each query on the kept keys, and b the sum of exp(logit - shift) over the whole block.
    With `relative_mass` the shift is the query's log mass: b is 1, the error of the mass is relative, and every query
    counts alike. Without, the shift is the query's largest logit, as in the paper, and queries of diffuse attention
    (large b) count more. If the system is singular, the solution nearest to w = 1 (no bias) is taken.

    Args:
        block: the exact block.
        key: (B, t, head_dim) float32, the kept keys; any keys of the block in padding.
        inherited: (B, t) float32, the biases that the kept keys already have; -inf in padding.
        exact: the block's own attention.
        options: bounds (low, high) and ridge of the biases, and the weighting of the mass.

    Returns:
        (B, t) float32, to be added to `inherited`; 0 in padding.
    """
    is_slot = inherited > -torch.inf
    system = _mass_system(block, key, inherited, exact, options.relative_mass)
    gram = add_ridge(without_padding(system.gram, is_slot), is_slot, options.bias_ridge)
    low, high = (math.expm1(bound) for bound in options.bias_bounds)
    change = bounded_least_squares(damped_cholesky(gram)[0], system.target[:, :, 0], low, high)
    return torch.where(is_slot, torch.log1p(change).float(), 0.0)


def _mass_system(
    block: Block, key: Tensor, inherited: Tensor, exact: ExactAttention, is_relative: bool
) -> NormalEquations:
    """Normal equations of A (w - 1) = b - A 1. If every key is kept, the right side is 0, and so is every bias."""
    shift = exact.log_mass if is_relative else exact.max_logit
    mass = ((exact.log_mass - shift).exp() * exact.weight)[:, :, None]  # (B, num_queries, 1)
    base2_shift = (shift * LOG2_E - exact.weight.log2())[:, :, None]
    system = NormalEquations(block.num_heads, key.shape[1], 1, key.device)
    for rows, feature in block.base2_logits(key, inherited):
        feature.sub_(base2_shift[:, rows]).exp2_()  # (B, chunk, t)
        system.add(feature, mass[:, rows] - feature.sum(2, keepdim=True))
    return system
