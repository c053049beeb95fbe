"""The definition: Attention Matching of one head, in the paper's symbols (arXiv:2602.16284, section 3), in float64.

It is slow. The rest of this package computes the same for batches, and is tested against this file.

    Q (n, d)   Block.query, pooled over a GQA group     C_k (t, d)    Fit.key
    K (T, d)   Block.key                                beta (t,)     Fit.bias
    V (T, d)   Block.value                              C_v (t, d)    Fit.value
    L (n, T)   logits                                   S (t,)        indices of the kept keys
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.solver.block import Block
from am_memory.solver.exact import SMALL_BLOCK_TOKENS


@dataclass(frozen=True)
class Head:
    """One head of a block, in float64."""

    Q: Tensor
    K: Tensor
    V: Tensor
    L: Tensor
    share: Tensor  # (n,): the part of each query's attention that goes to the block
    weight: Tensor  # (n,): how much each query counts in the fits, relative to the largest

    @classmethod
    def of(cls, block: Block, index: int) -> Head:
        Q, K, V = (tensor[index].double() for tensor in (block.query, block.key, block.value))
        L = Q @ K.T * block.scaling
        if block.softcap is not None:
            L = block.softcap * torch.tanh(L / block.softcap)
        if block.key_bias is not None:
            L = L + block.key_bias[index].double()
        share = torch.ones(len(Q), dtype=torch.float64)
        if block.log_mass is not None:
            share = torch.exp(L.logsumexp(1) - block.log_mass[index].double())
        relative = share / share.max()
        half = (int(block.num_keys[index]) / SMALL_BLOCK_TOKENS) ** 2 * relative.mean()
        return cls(Q, K, V, L, share, relative * (1 + half) / (relative + half))


def attention_scores(head: Head) -> Tensor:
    """(T,): root mean square over the queries of the attention that each key gets."""
    return (head.share[:, None] * torch.softmax(head.L, dim=1)).square().mean(0).sqrt()


def highest_attention(scores: Tensor, t: int) -> list[int]:
    """S: the t keys of the highest score; of equal scores the lower index first."""
    return sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:t]


def omp(head: Head, t: int, is_relative: bool = False, picks_per_refit: int = 1) -> list[int]:
    """S: orthogonal matching pursuit on the mass, with a least-squares refit after every few picks.

    Negative weights count as 0, because a weight is the exponential of a bias.
    """
    A, b = mass_system(head, head.share, is_relative)
    S: list[int] = []
    residual = b
    while len(S) < t:
        correlation = A.T @ residual
        correlation[S] = -torch.inf
        S += correlation.topk(min(picks_per_refit, t - len(S))).indices.tolist()
        w = torch.linalg.lstsq(A[:, S], b[:, None], driver="gelsd").solution[:, 0]
        residual = b - A[:, S] @ w.clamp_min(0.0)
    return S


def mass_system(head: Head, weight: Tensor, is_relative: bool = True) -> tuple[Tensor, Tensor]:
    """A (n, T) and b (n,) with A 1 = b: the weighted exp(L) and its row sums, the mass of the block for each query.

    Rows may be scaled. The paper divides each by its largest exp(logit); `is_relative` divides it by its mass.
    """
    shift = head.L.logsumexp(1) if is_relative else head.L.amax(1)
    A = weight[:, None] * torch.exp(head.L - shift[:, None])
    return A, A.sum(1)


def bounded_nnls(A: Tensor, b: Tensor, low: float, high: float, num_sweeps: int = 20_000) -> Tensor:
    """The w (t,) that minimises ||A w - b||^2 over low <= w <= high, by cyclic coordinate descent."""
    G, r = A.T @ A, A.T @ b
    w = torch.ones_like(r).clamp(low, high)
    for _ in range(num_sweeps):
        before = w.clone()
        for j in range(len(w)):
            if G[j, j] > 0:
                w[j] = (w[j] + (r[j] - G[j] @ w) / G[j, j]).clamp(low, high)
        if (w - before).abs().max() < 1e-10:
            break
    return w


def values(head: Head, S: list[int], log_w: Tensor, ridge: float) -> Tensor:
    """C_v (t, d): least squares on the attention output, with a ridge toward the original values."""
    Y = torch.softmax(head.L, dim=1) @ head.V
    X = torch.softmax(head.L[:, S] + log_w, dim=1)
    missing = head.weight[:, None] * (Y - X @ head.V[S])
    X = head.weight[:, None] * X
    G = X.T @ X
    damping = ridge * G.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)
    D: Tensor = torch.linalg.solve(G + damping, X.T @ missing)
    return head.V[S] + D


def compact(
    head: Head,
    S: list[int],
    bounds: tuple[float, float] = (-3.0, 3.0),
    ridge: float = 1e-2,
    is_relative: bool = True,
) -> tuple[Tensor, Tensor]:
    """log w (t,) and C_v (t, d) of the kept keys S; beta is log w plus any bias that the keys already had."""
    low, high = torch.tensor(bounds, dtype=torch.float64).exp().tolist()
    A, b = mass_system(head, head.weight, is_relative)
    log_w = bounded_nnls(A[:, S], b, low, high).log()
    return log_w, values(head, S, log_w, ridge)


def errors(head: Head, compact_L: Tensor, C_v: Tensor) -> tuple[Tensor, Tensor]:
    """`Fit.mass_error` and `Fit.output_error`, from the logits (n, t) on the kept keys, biases included."""
    mass_ratio = torch.exp(compact_L.logsumexp(1) - head.L.logsumexp(1))
    Y = head.weight[:, None] * (torch.softmax(head.L, dim=1) @ head.V)
    error = head.weight[:, None] * (torch.softmax(compact_L, dim=1) @ C_v.double()) - Y
    mass_error = (head.weight * (mass_ratio - 1)).norm() / head.weight.norm()
    return mass_error, error.norm() / Y.norm()
