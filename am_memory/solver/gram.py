"""Normal equations of least-squares systems: accumulation over chunks of rows, padding, damping."""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.errors import InvalidInput

LEAST_DAMPING = 2.0**-22
"""Damping of a Gram matrix, relative to its largest row sum: a few times the rounding of its float32 entries."""
GRAM_PANEL = 128
"""A Gram matrix is computed in column panels of this width, to skip most of its upper triangle."""


class NormalEquations:
    """A^T A and A^T R of a tall system, added up over chunks of its rows.

    The products of a chunk are float32 matmuls. The sums over chunks are float64, so that rounding does not grow with
    the number of rows.
    """

    def __init__(self, num_heads: int, size: int, num_targets: int, device: torch.device) -> None:
        self._gram = torch.zeros(num_heads, size, size, dtype=torch.float64, device=device)
        self._target = torch.zeros(num_heads, num_targets, size, dtype=torch.float64, device=device)

    @property
    def gram(self) -> Tensor:
        """(B, t, t) float64."""
        return self._gram.tril() + self._gram.tril(-1).mT

    @property
    def target(self) -> Tensor:
        """(B, t, num_targets) float64."""
        return self._target.mT

    def add(self, matrix: Tensor, right: Tensor) -> None:
        """Add rows: matrix (B, chunk, t) and right (B, chunk, num_targets), float32."""
        for start in range(0, matrix.shape[2], GRAM_PANEL):
            panel = slice(start, start + GRAM_PANEL)
            self._gram[:, start:, panel] += torch.bmm(matrix[:, :, start:].mT, matrix[:, :, panel])
        # A single target is a row vector this way, and bmm is several times faster than with a column.
        self._target += torch.bmm(right.mT, matrix)


def without_padding(gram: Tensor, is_slot: Tensor) -> Tensor:
    """(B, t, t): rows and columns of padding replaced by a diagonal, with the mean of the head's own diagonal."""
    padded = torch.where(is_slot[:, :, None] & is_slot[:, None], gram, 0.0)
    mean = mean_diagonal(padded, is_slot)
    return padded + torch.diag_embed(torch.where(is_slot, 0.0, torch.where(mean > 0, mean, 1.0)))


def add_ridge(gram: Tensor, is_slot: Tensor, ridge: float) -> Tensor:
    """(B, t, t): ridge times the mean diagonal of each head, added to the diagonal of its slots."""
    return gram + torch.diag_embed(ridge * mean_diagonal(gram, is_slot) * is_slot)


def mean_diagonal(gram: Tensor, is_slot: Tensor) -> Tensor:
    """(B, 1): mean over the slots of each head; 0 for a head without slots."""
    diagonal = torch.where(is_slot, gram.diagonal(dim1=1, dim2=2), 0.0)
    return diagonal.sum(1, keepdim=True) / is_slot.sum(1, keepdim=True).clamp_min(1)


def damped_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factorisation of a Gram matrix of non-negative entries, with as little damping as it needs.

    Duplicate keys, or fewer queries than slots, make the matrix singular. Rounding in float32 then moves eigenvalues
    below zero, by about the roundoff times the largest eigenvalue, which the largest row sum bounds. Matmuls of lower
    precision (TF32) move them further: heads that still do not factor get ten times more damping.

    Args:
        gram: (B, t, t) float64, without padding.

    Returns:
        (B, t, t) float64, the damped matrix, and its lower Cholesky factor.

    Raises:
        InvalidInput: the matrix is not finite.
    """
    if not gram.isfinite().all():
        raise InvalidInput("the attention weights are not finite: look for NaN or infinity in the queries and keys")
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    damping = LEAST_DAMPING * gram.sum(2).amax(1)
    damping = torch.where(damping > 0, damping, 1.0)
    while True:  # ends: a damping above the largest row sum makes the matrix diagonally dominant
        damped = gram + damping[:, None, None] * identity
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            return damped, factor
        damping = torch.where(info > 0, 10 * damping, damping)
