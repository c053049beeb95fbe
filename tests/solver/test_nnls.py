import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from am_memory.errors import CompactionFailed
from am_memory.solver import naive, nnls
from am_memory.solver.gram import damped_cholesky
from am_memory.solver.nnls import bounded_least_squares

LOWER, UPPER = math.expm1(-3), math.expm1(3)


def random_system(
    seed: int, num_rows: int, size: int, peakedness: float, num_alike: int, num_heads: int = 2
) -> tuple[Tensor, Tensor]:
    """Gram and target of non-negative columns, of which num_alike + 1 are nearly multiples of each other."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(num_heads, num_rows, size, generator=generator) ** peakedness
    alike = 1 + 1e-4 * torch.rand(num_heads, 1, num_alike, generator=generator)
    matrix[:, :, 1 : 1 + num_alike] = matrix[:, :, :1] * alike
    right = 5 * torch.randn(num_heads, num_rows, 1, generator=generator) + matrix.sum(2, keepdim=True)
    gram, _ = damped_cholesky((matrix.mT @ matrix).double())
    return gram, (matrix.mT @ right).double()[:, :, 0]


def objective(gram: Tensor, target: Tensor, x: Tensor) -> Tensor:
    return (0.5 * (gram @ x[:, :, None])[:, :, 0] * x - target * x).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 60),
    size=st.integers(1, 40),
    peakedness=st.sampled_from([1.0, 8.0, 30.0]),
    share_alike=st.sampled_from([0.0, 0.0, 0.5, 0.9]),
)
def test_the_solution_satisfies_the_kkt_conditions(seed, num_rows, size, peakedness, share_alike):
    gram, target = random_system(seed, num_rows, size, peakedness, int(share_alike * (size - 1)))
    x = bounded_least_squares(gram, target, LOWER, UPPER)
    slope = ((gram @ x[:, :, None])[:, :, 0] - target) / gram.diagonal(dim1=1, dim2=2)  # in units of x
    assert (x >= LOWER).all()
    assert (x <= UPPER).all()
    inside = (x > LOWER) & (x < UPPER)
    assert (slope[inside].abs() <= 2e-7).all()
    assert (slope[x == LOWER] >= -2e-7).all()
    assert (slope[x == UPPER] <= 2e-7).all()


@pytest.mark.parametrize("num_alike", [0, 5])
@pytest.mark.parametrize("num_rows", [4, 12, 100])
def test_the_solution_is_that_of_slow_coordinate_descent(num_rows, num_alike):
    gram, target = random_system(1, num_rows, 12, 4.0, num_alike, num_heads=1)
    root = torch.linalg.cholesky(gram[0]).mT  # a square system of the same Gram matrix
    right = torch.linalg.solve_triangular(root.mT, target[0][:, None], upper=False)[:, 0]
    slow = naive.bounded_nnls(root, right, LOWER, UPPER, num_sweeps=1000)[None]
    fast = bounded_least_squares(gram, target, LOWER, UPPER)
    scale = objective(gram, target, slow).abs()
    assert (objective(gram, target, fast) <= objective(gram, target, slow) + 1e-10 * scale).all()


def test_within_wide_bounds_it_is_the_unconstrained_solution():
    gram, target = random_system(2, 100, 20, 4.0, 0)
    expected = torch.linalg.solve(gram, target)
    torch.testing.assert_close(bounded_least_squares(gram, target, -1e6, 1e6), expected)


def test_a_target_of_zero_gives_exactly_zero():
    gram, target = random_system(3, 30, 20, 4.0, 10)
    assert (bounded_least_squares(gram, torch.zeros_like(target), LOWER, UPPER) == 0).all()


def test_a_head_has_the_same_solution_alone_and_in_a_batch():
    gram, target = random_system(4, 30, 20, 8.0, 10, num_heads=5)
    together = bounded_least_squares(gram, target, LOWER, UPPER)
    alone = [bounded_least_squares(gram[head, None], target[head, None], LOWER, UPPER) for head in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_nearly_dependent_columns_do_not_make_it_cycle(seed):
    """Block principal pivoting cycled for ever on half the columns alike to 1e-4, and plain projected Newton crept."""
    gram, target = random_system(seed, 200, 100, 1.0, 50)
    bounded_least_squares(gram, target, LOWER, UPPER)


@pytest.mark.parametrize("seed", [5, 21, 26, 40, 45])
def test_fewer_rows_than_columns_do_not_make_it_cycle(seed):
    """Full projected steps alone never ended on these."""
    bounded_least_squares(*random_system(seed, 8, 40, 8.0, 0), LOWER, UPPER)


def test_an_unsolved_system_is_an_error_and_not_an_answer(monkeypatch):
    monkeypatch.setattr(nnls, "MAX_ITERATIONS", 1)
    with pytest.raises(CompactionFailed, match="20 biases"):
        bounded_least_squares(*random_system(5, 100, 20, 4.0, 0), LOWER, UPPER)
