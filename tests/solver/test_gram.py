import pytest
import torch

from am_memory.errors import InvalidInput
from am_memory.solver.gram import NormalEquations, add_ridge, damped_cholesky, without_padding


def test_chunks_add_up_to_the_products_of_the_whole():
    matrix, right = torch.randn(2, 50, 300), torch.randn(2, 50, 3)
    system = NormalEquations(2, 300, 3, matrix.device)
    for rows in (slice(0, 20), slice(20, 21), slice(21, 50)):
        system.add(matrix[:, rows], right[:, rows])
    torch.testing.assert_close(system.gram, (matrix.mT @ matrix).double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(system.target, (matrix.mT @ right).double(), rtol=1e-4, atol=1e-4)


def test_padding_of_nan_becomes_a_diagonal_of_the_heads_own_scale():
    gram = torch.full((1, 3, 3), torch.nan, dtype=torch.float64)
    gram[:, :2, :2] = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    is_slot = torch.tensor([[True, True, False]])
    assert without_padding(gram, is_slot).tolist() == [[[2, 1, 0], [1, 4, 0], [0, 0, 3]]]


def test_a_head_of_nothing_but_padding_becomes_the_identity():
    gram = torch.full((1, 2, 2), torch.nan, dtype=torch.float64)
    assert without_padding(gram, torch.tensor([[False, False]])).tolist() == [[[1, 0], [0, 1]]]


def test_the_ridge_is_relative_to_the_mean_diagonal_of_the_slots():
    gram = torch.diag(torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64))[None]
    is_slot = torch.tensor([[True, True, False]])
    assert add_ridge(gram, is_slot, 0.5).diagonal(dim1=1, dim2=2).tolist() == [[3.5, 5.5, 1.0]]


@pytest.mark.parametrize("rows", [1, 5, 200])
def test_a_singular_matrix_of_float32_products_factors_after_a_small_damping(rows):
    matrix = torch.rand(3, rows, 40).repeat(1, 1, 3)
    gram = (matrix.mT @ matrix).double()
    damped, factor = damped_cholesky(gram)
    torch.testing.assert_close(factor @ factor.mT, damped)
    assert (damped - gram).abs().max() < 1e-6 * gram.sum(2).max()


def test_a_matrix_of_zeros_factors():
    damped, _ = damped_cholesky(torch.zeros(1, 4, 4, dtype=torch.float64))
    assert damped.isfinite().all()


def test_a_head_that_needs_more_damping_does_not_change_the_others():
    good = torch.eye(3, dtype=torch.float64)
    indefinite = torch.tensor([[1.0, 1.1, 0.0], [1.1, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    damped, _ = damped_cholesky(torch.stack((good, indefinite)))
    torch.testing.assert_close(damped[0], damped_cholesky(good[None])[0][0], rtol=0, atol=0)
    assert 0.1 < damped[1, 0, 0] - 1 < 1.1


def test_a_matrix_of_nan_is_refused():
    with pytest.raises(InvalidInput, match="NaN or infinity in the queries and keys"):
        damped_cholesky(torch.full((1, 2, 2), torch.nan, dtype=torch.float64))
