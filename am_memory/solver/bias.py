"""The biases of the kept keys: bounded least squares on the block's attention mass (arXiv:2602.16284, section 3.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.exact import ExactAttention
from am_memory.solver.gram import NormalEquations, damped_cholesky, without_padding
from am_memory.solver.nnls import bounded_least_squares


def solve_bias(
    block: Block, key: Tensor, is_slot: Tensor, exact: ExactAttention, bounds: tuple[float, float], is_relative: bool
) -> Tensor:
    """Logarithm of the w within [e^low, e^high] that minimises ||A w - b||^2.

    A holds exp(logit - shift) of each query on the kept keys, b the sum of exp(logit - shift) over the whole block.
    With the query's log mass as shift, b is 1, the error of the mass is relative and every query counts alike; with
    its largest logit, as in the paper, queries of diffuse attention (large b) count more. Where the system is singular,
    the solution nearest to w = 1 (no bias) is taken.

    Args:
        block: the exact block.
        key: (B, t, head_dim) float32, the kept keys; in padding any key of the block.
        is_slot: (B, t) bool, False in padding.
        exact: the block's own attention.
        bounds: of the bias, with low <= 0 <= high.
        is_relative: shift by the log mass.

    Returns:
        (B, t) float32, -inf in padding.
    """
    shift = exact.log_mass if is_relative else exact.max_logit
    mass = (exact.log_mass - shift).exp()[:, :, None]  # (B, num_queries, 1)
    # The unknown is w - 1 and the target the missing mass: keeping every key leaves nothing to explain, hence no bias.
    system = NormalEquations(block.num_heads, key.shape[1], 1, key.device)
    base2_key, counted = block.base2_key(key), is_slot.float()[:, :, None]
    for rows, query in block.query_chunks(key.shape[1]):
        feature = torch.bmm(query, base2_key)
        feature.sub_(shift[:, rows, None] * LOG2_E).exp2_()  # (B, chunk, t)
        system.add(feature, mass[:, rows] - torch.bmm(feature, counted))
    gram, _ = damped_cholesky(without_padding(system.gram, is_slot))
    low, high = (math.expm1(bound) for bound in bounds)
    change = bounded_least_squares(gram, torch.where(is_slot, system.target[:, :, 0], 0.0), low, high)
    return torch.where(is_slot, torch.log1p(change).float(), -torch.inf)
