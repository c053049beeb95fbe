"""Bounded least squares of a batch, from its normal equations, solved until the optimality (KKT) conditions hold."""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.errors import CompactionFailed

MAX_ITERATIONS = 500
KKT_TOLERANCE = 1e-7
"""Largest KKT residual of a solution, in units of x: the float32 rounding of the biases."""
STEP_LENGTHS = tuple(0.5**power for power in range(5))
"""Tried along each projected Newton direction; 1 is optimal near the solution."""


def bounded_least_squares(gram: Tensor, target: Tensor, lower: float, upper: float) -> Tensor:
    """Minimise x^T G x / 2 - x^T r over lower <= x <= upper, by the projected Newton method (Bertsekas, 1982).

    Each iteration holds the variables on a bound whose gradient points outward, takes the Newton step of the others by
    Cholesky, and projects it into the bounds. Every iteration lowers the objective, so the method cannot cycle; block
    principal pivoting can, on nearly dependent columns. Typical systems take 2 to 5 iterations. Singular ones, which
    damping has made definite, take up to a few dozen.

    Args:
        gram: (B, t, t) float64, symmetric positive definite.
        target: (B, t) float64.
        lower, upper: bounds of every variable, with lower <= 0 <= upper.

    Returns:
        (B, t) float64, whose KKT residual is at most KKT_TOLERANCE in units of x.

    Raises:
        CompactionFailed: not solved within MAX_ITERATIONS.
    """
    solution = torch.zeros_like(target)
    unsolved = torch.arange(len(target), device=target.device)
    x = solution
    for _ in range(MAX_ITERATIONS):
        gradient = _multiply(gram, x) - target
        wanted = (x - gradient / gram.diagonal(dim1=1, dim2=2)).clamp(lower, upper)
        is_near = (x - wanted).abs() <= KKT_TOLERANCE
        is_held = is_near & (x != wanted) & ((wanted == lower) | (wanted == upper))
        if is_held.any():  # within the tolerance of a bound: put it on the bound
            x = torch.where(is_held, wanted, x)
            continue
        is_solved = is_near.all(1)
        if is_solved.any():  # continue with the others alone
            solution[unsolved[is_solved]] = x[is_solved]
            if is_solved.all():
                return solution
            state = unsolved, gram, target, x, gradient
            unsolved, gram, target, x, gradient = (tensor[~is_solved] for tensor in state)
        x = _best_point_on_path(gram, gradient, x, _newton_direction(gram, gradient, x, lower, upper), lower, upper)
    raise CompactionFailed(
        f"the bounded least squares of {x.shape[1]} biases is not solved after {MAX_ITERATIONS} iterations: "
        "give more reference queries, or narrower bias bounds"
    )


def _multiply(gram: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(gram, x[:, :, None])[:, :, 0]


def _newton_direction(gram: Tensor, gradient: Tensor, x: Tensor, lower: float, upper: float) -> Tensor:
    """(B, t): the step to the minimum over the free variables; 0 for held ones.

    A variable on a bound is free if its gradient points inward. The joint step may still push it outward; projecting it
    back would leave a poor step for the others. Such variables are held too, and the step is computed again. Some free
    variable always moves inward, because the direction descends.
    """
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    is_low, is_high = x <= lower, x >= upper
    is_free = ~((is_low & (gradient > 0)) | (is_high & (gradient < 0)))
    while True:
        factor = torch.linalg.cholesky(torch.where(is_free[:, :, None] & is_free[:, None], gram, identity))
        right = torch.where(is_free, -gradient, 0.0)
        direction = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        leaves = (is_low & (direction < 0)) | (is_high & (direction > 0))
        if not leaves.any():
            return direction
        is_free &= ~leaves


def _best_point_on_path(
    gram: Tensor, gradient: Tensor, x: Tensor, direction: Tensor, lower: float, upper: float
) -> Tensor:
    """(B, t): the point of the lowest objective among several of the path x + step * direction, projected.

    One of them is where the path meets its first bound. Up to there the path is straight, so the objective falls.
    """
    room = torch.where(direction > 0, upper - x, x - lower) / direction.abs()
    first_bound = torch.where(direction != 0, room, 1.0).amin(1, keepdim=True).clamp_max(1.0)
    steps = torch.cat((x.new_tensor(STEP_LENGTHS).expand(len(x), -1), first_bound), 1)  # (B, num_steps)
    points = (x[:, None] + steps[:, :, None] * direction[:, None]).clamp(lower, upper)  # (B, num_steps, t)
    moves = points - x[:, None]
    change = (0.5 * torch.bmm(moves, gram) + gradient[:, None]).mul_(moves).sum(2)
    best = change.argmin(1)[:, None, None].expand(-1, 1, x.shape[1])
    return points.gather(1, best)[:, 0]
