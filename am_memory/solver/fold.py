"""Biases folded into keys, for attention kernels that take no bias.

If a direction delta has query . delta = 1 for every query, then adding bias * delta / scaling to a key adds the bias to
each of its logits. The queries of one head lie close to a hyperplane off the origin, so most heads have such a
direction. Least squares on the reference queries finds it.

RoPE rotates the queries of later tokens. The sample therefore holds the same queries rotated to later positions too:
the direction found lies in the slow dimensions of the RoPE, and holds for thousands of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.solver.block import Block

RIDGE = 1e-4
"""Relative to the mean diagonal of the queries' Gram matrix. It bounds delta along directions that no query has."""
MAX_FOLD_ERROR = 0.3
"""Largest RMS of query . delta - 1 at which a head gets biases."""


def constant_direction(block: Block, weight: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
    """The direction whose product with every rotated query is nearest to 1, in least squares.

    Args:
        weight: (B, num_queries) float32, how much each query counts.
        rotations: (B, num_distances, head_dim, head_dim), rotate a query to later positions; all count alike.

    Returns:
        delta, (B, head_dim) float32; and the weighted RMS of query . delta - 1 over rotated queries, (B,) float32.
    """
    query = block.query.double() * weight.double()[:, :, None]
    turn, total = rotations.double(), weight.double().square().sum(1)
    # Rotated queries q R^T have the Gram matrix R (q^T q) R^T, so they need not be materialised.
    gram = (turn @ (query.mT @ query)[:, None] @ turn.mT).mean(1)
    target = (turn @ (query.mT @ weight.double()[:, :, None])[:, None]).mean(1)  # (B, head_dim, 1)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    damped = gram + torch.eye(block.head_dim, dtype=gram.dtype, device=gram.device) * (RIDGE * mean)[:, None, None]
    delta = torch.cholesky_solve(target, torch.linalg.cholesky(damped))
    missing = ((gram @ delta - 2 * target) * delta).sum((1, 2)) / total + 1
    return delta[:, :, 0].float(), missing.clamp_min(0.0).sqrt().float()


def cannot_fold(error: Tensor) -> Tensor:
    """(B,) bool: True for a head whose error of `constant_direction` is too large; it gets no biases."""
    return error > MAX_FOLD_ERROR


def fold(block: Block, key: Tensor, bias: Tensor, weight: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fold biases into keys.

    Args:
        key: (B, t, head_dim) float32.
        bias: (B, t) float32; -inf in padding.
        weight: (B, num_queries) float32, how much each query counts.
        rotations: (B, num_distances, head_dim, head_dim), as for `constant_direction`.

    Returns:
        The keys, (B, t, head_dim) float32; the biases that are left, (B, t): 0, and -inf in padding; and the error of
        `constant_direction`, (B,) float32. A head whose error is above `MAX_FOLD_ERROR` keeps its keys and loses its
        biases.
    """
    delta, error = constant_direction(block, weight, rotations)
    is_padding = bias == -torch.inf
    added = torch.where(is_padding | cannot_fold(error)[:, None], 0.0, bias)
    folded = key + added[:, :, None] * delta[:, None] / block.scaling
    return folded, torch.where(is_padding, -torch.inf, 0.0), error
