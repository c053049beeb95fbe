"""A bias that is part of the key, for attention kernels that take none.

If a direction delta has the same product with every query, query . delta = 1, then adding bias * delta / scaling to a
key adds the bias to each of its scores. The queries of one head lie nearly in a hyperplane off the origin, so that such
a direction exists in most heads; it is found by least squares on the reference queries.

RoPE turns the queries of later tokens, so the same queries turned to later positions are part of that sample: the
direction that is found lies where the turn is slow, and holds for thousands of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.solver.block import Block

RIDGE = 1e-4
"""Relative to the mean diagonal of the queries' Gram matrix: without it, directions that no query takes go anywhere."""
MAX_FOLD_ERROR = 0.3
"""RMS of query . delta - 1, above which a head does without a bias."""


def constant_direction(block: Block, weight: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """The direction whose product with every query, turned in every way, is nearest to 1.

    Args:
        weight: (B, num_queries) float32, how much each query counts.
        rotations: (B, num_distances, head_dim, head_dim), what turns a query to later positions; each counts alike.

    Returns:
        delta (B, head_dim) float32; and the weighted RMS over turned queries of query . delta - 1, (B,) float32.
    """
    query = block.query.double() * weight.double()[:, :, None]
    turn, total = rotations.double(), weight.double().square().sum(1)
    # Turned queries q R^T have the Gram matrix R (q^T q) R^T, so that no copy of them has to be made.
    gram = (turn @ (query.mT @ query)[:, None] @ turn.mT).mean(1)
    target = (turn @ (query.mT @ weight.double()[:, :, None])[:, None]).mean(1)  # (B, head_dim, 1)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    damped = gram + torch.eye(block.head_dim, dtype=gram.dtype, device=gram.device) * (RIDGE * mean)[:, None, None]
    delta = torch.cholesky_solve(target, torch.linalg.cholesky(damped))
    missing = ((gram @ delta - 2 * target) * delta).sum((1, 2)) / total + 1
    return delta[:, :, 0].float(), missing.clamp_min(0.0).sqrt().float()


def fold(block: Block, key: Tensor, bias: Tensor, weight: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that bring their bias with them.

    Args:
        key: (B, t, head_dim) float32.
        bias: (B, t) float32; -inf in padding.
        weight: (B, num_queries) float32, how much each query counts.
        rotations: (B, num_distances, head_dim, head_dim), as `constant_direction` takes them.

    Returns:
        The keys; biases of 0, and -inf in padding; and for each head, (B,) float32, how far off the folded bias is, as
        `constant_direction` has it. A head where that is more than `MAX_FOLD_ERROR` keeps its keys as they are.
    """
    delta, error = constant_direction(block, weight, rotations)
    is_padding = bias == -torch.inf
    added = torch.where(is_padding | (error > MAX_FOLD_ERROR)[:, None], 0.0, bias)
    folded = key + added[:, :, None] * delta[:, None] / block.scaling
    return folded, torch.where(is_padding, -torch.inf, 0.0), error
