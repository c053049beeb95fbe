"""The definition: Attention Matching of one head, in the paper's symbols (arXiv:2602.16284, section 3). Slow, float64.

Everything else in this package computes the same for batches, faster, and is tested against this file.

    Q (n, d)   Block.query, pooled over a GQA group     C_k (t, d)    Fit.key
    K (T, d)   Block.key                                beta (t,)     Fit.bias, w = exp(beta)
    V (T, d)   Block.value                              C_v (t, d)    Fit.value
    scale      Block.scaling                            S (t,)        indices of the kept keys
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_scores(Q: Tensor, K: Tensor, scale: float) -> Tensor:
    """(T,): RMS over the queries of each key's softmax weight."""
    return torch.softmax(logits(Q, K, scale), dim=1).square().mean(0).sqrt()


def highest_attention(scores: Tensor, t: int) -> list[int]:
    """S: the t keys of the highest score, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:t]


def omp(Q: Tensor, K: Tensor, scale: float, t: int, is_relative: bool = True) -> list[int]:
    """S: orthogonal matching pursuit on the mass, with a least-squares refit after each pick."""
    A, b = mass_system(Q, K, scale, list(range(len(K))), is_relative)
    S: list[int] = []
    residual = b
    while len(S) < t:
        correlation = A.T @ residual
        correlation[S] = -torch.inf
        S.append(int(correlation.argmax()))
        w = torch.linalg.lstsq(A[:, S], b[:, None], driver="gelsd").solution[:, 0]
        residual = b - A[:, S] @ w
    return S


def mass_system(Q: Tensor, K: Tensor, scale: float, S: list[int], is_relative: bool = True) -> tuple[Tensor, Tensor]:
    """A (n, t) and b (n,) with A w = b when w exp(q.c) sums to the mass of the whole block, for every query q.

    A query's row may be scaled at will: the paper divides it by its largest exp(logit), relative divides it by b.
    """
    L = logits(Q, K, scale)
    shift = L.logsumexp(1) if is_relative else L.amax(1)
    A = torch.exp(L - shift[:, None])
    return A[:, S], A.sum(1)


def bounded_nnls(A: Tensor, b: Tensor, low: float, high: float, num_sweeps: int = 20_000) -> Tensor:
    """w (t,) that minimises ||A w - b||^2 over low <= w <= high, by cyclic coordinate descent."""
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


def values(Q: Tensor, K: Tensor, V: Tensor, scale: float, S: list[int], beta: Tensor, ridge: float) -> Tensor:
    """C_v (t, d): least squares of the output, with a ridge toward the original values."""
    Y = torch.softmax(logits(Q, K, scale), dim=1) @ V.double()
    X = torch.softmax(logits(Q, K[S], scale) + beta, dim=1)
    G = X.T @ X
    damping = ridge * G.diagonal().mean() * torch.eye(len(S), dtype=G.dtype)
    D: Tensor = torch.linalg.solve(G + damping, X.T @ (Y - X @ V[S].double()))
    return V[S].double() + D


def compact(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    scale: float,
    S: list[int],
    bounds: tuple[float, float] = (-3.0, 3.0),
    ridge: float = 1e-2,
    is_relative: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """C_k, beta, C_v of the kept keys S."""
    low, high = torch.tensor(bounds, dtype=torch.float64).exp().tolist()
    A, b = mass_system(Q, K, scale, S, is_relative)
    beta = bounded_nnls(A, b, low, high).log()
    return K[S].double(), beta, values(Q, K, V, scale, S, beta, ridge)


def errors(
    Q: Tensor, K: Tensor, V: Tensor, scale: float, C_k: Tensor, beta: Tensor, C_v: Tensor
) -> tuple[Tensor, Tensor]:
    """Fit.mass_error and Fit.output_error of one head."""
    exact, compacted = logits(Q, K, scale), logits(Q, C_k, scale) + beta
    mass_ratio = torch.exp(compacted.logsumexp(1) - exact.logsumexp(1))
    output = torch.softmax(exact, dim=1) @ V.double()
    error = torch.softmax(compacted, dim=1) @ C_v.double() - output
    return (mass_ratio - 1).square().mean().sqrt(), error.square().mean().sqrt() / output.square().mean().sqrt()


def logits(Q: Tensor, K: Tensor, scale: float) -> Tensor:
    """(n, T) float64."""
    return Q.double() @ K.double().T * scale
