"""Biases folded into keys: exact where there is a direction that all queries share, and left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from am_memory.solver import Block, FitOptions, exact_attention, fit
from am_memory.solver.fold import MAX_FOLD_ERROR, constant_direction, fold

B, N, T, D = 3, 200, 40, 16
STILL = torch.eye(D).expand(B, 1, D, D)


def block_of(offset: float, *, scaling: float = 0.25) -> Block:
    """Queries scattered around a common point, `offset` away from the origin."""
    center = torch.nn.functional.normalize(torch.randn(B, 1, D), dim=-1) * offset
    spread = torch.randn(B, N, D)
    spread = spread - (spread * center).sum(-1, keepdim=True) * center / offset**2  # in the plane through the point
    return Block(center + spread, torch.randn(B, T, D), torch.randn(B, T, D), scaling)


def logits(block: Block, key: Tensor) -> Tensor:
    return block.query @ key.mT * block.scaling


@pytest.mark.parametrize("scaling", [0.25, 1.0])
def test_a_folded_bias_is_added_to_every_score(scaling: float) -> None:
    block, bias = block_of(3.0, scaling=scaling), torch.randn(B, T)
    folded, left, error = fold(block, block.key, bias, torch.ones(B, N), STILL)
    assert not left.any()
    assert error.max() < 1e-2
    expected = logits(block, block.key) + bias[:, None]
    torch.testing.assert_close(logits(block, folded), expected, atol=2e-2, rtol=0)


def test_the_error_is_what_is_missing_to_a_constant() -> None:
    block = Block(torch.randn(B, N, D) + 1, torch.randn(B, T, D), torch.randn(B, T, D), 0.25)
    delta, error = constant_direction(block, torch.ones(B, N), STILL)
    missing = (block.query @ delta[:, :, None])[:, :, 0] - 1
    torch.testing.assert_close(error, missing.square().mean(1).sqrt(), atol=1e-3, rtol=1e-3)


def test_queries_count_by_their_weight() -> None:
    """A query of no weight may lie anywhere."""
    block, weight = block_of(3.0), torch.ones(B, N)
    block.query[:, :20], weight[:, :20] = torch.randn(B, 20, D), 0
    assert constant_direction(block, weight, STILL)[1].max() < 1e-2
    assert constant_direction(block, torch.ones(B, N), STILL)[1].min() > 0.05


def test_a_head_without_such_a_direction_keeps_its_keys() -> None:
    query = torch.randn(B, N, D)
    query = torch.cat([query, -query], dim=1)  # what is added to one is taken from the other
    block = Block(query, torch.randn(B, T, D), torch.randn(B, T, D), 0.25)
    folded, left, error = fold(block, block.key, torch.randn(B, T), torch.ones(B, 2 * N), STILL)
    assert error.min() > MAX_FOLD_ERROR
    assert torch.equal(folded, block.key)
    assert not left.any()


def turns_by(*angles: float) -> Tensor:
    """(B, number of angles, D, D): the first half of the pairs turns by the angle, the second half stays."""
    rotations = torch.eye(D).repeat(len(angles), 1, 1)
    for rotation, angle in zip(rotations, torch.tensor(angles), strict=True):
        for pair in range(0, D // 2, 2):
            rotation[pair : pair + 2, pair : pair + 2] = torch.stack(
                [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
            )
    return rotations.expand(B, -1, -1, -1)


def test_the_direction_holds_for_queries_that_have_turned() -> None:
    """RoPE turned later queries away from a direction that was found on the reference queries alone: after 2,800 tokens
    folded biases were off by their own size in the worst head, and the text's NLL rose from 2.61 to 3.02."""
    block, turned = block_of(3.0), turns_by(0.0, 1.0, 2.0, 4.0)
    later = (block.query[:, None] @ turned.mT).flatten(1, 2)

    def error(delta: Tensor) -> Tensor:
        return ((later @ delta[:, :, None])[:, :, 0] - 1).square().mean(1).sqrt()

    near, _ = constant_direction(block, torch.ones(B, N), STILL)
    lasting, expected = constant_direction(block, torch.ones(B, N), turned)
    torch.testing.assert_close(error(lasting), expected, atol=1e-3, rtol=1e-3)
    assert (error(lasting) < 0.7 * error(near)).all()


def test_a_direction_that_turns_with_the_text_is_none() -> None:
    """Where all that the queries share turns away, a constant is not to be had."""
    block = block_of(3.0)
    block.query[:, :, D // 2 :] -= block.query[:, :, D // 2 :].mean(1, keepdim=True)
    half = turns_by(*torch.linspace(0, 2 * torch.pi, 17)[:-1].tolist())
    assert constant_direction(block, torch.ones(B, N), half)[1].min() > MAX_FOLD_ERROR


def test_padding_stays_padding() -> None:
    block, bias = block_of(3.0), torch.randn(B, T)
    bias[1, 30:] = -torch.inf
    folded, left, _ = fold(block, block.key, bias, torch.ones(B, N), STILL)
    assert torch.equal(folded[1, 30:], block.key[1, 30:])
    assert torch.equal(left == -torch.inf, bias == -torch.inf)


def test_queries_that_are_all_alike_are_no_reason_to_fail() -> None:
    """One query repeated has a Gram matrix of rank one."""
    block = Block(torch.randn(B, 1, D).expand(B, N, D), torch.randn(B, T, D), torch.randn(B, T, D), 0.25)
    folded, _, error = fold(block, block.key, torch.ones(B, T), torch.ones(B, N), STILL)
    assert folded.isfinite().all()
    assert error.max() < 1e-2


def test_a_fit_with_folded_biases_is_almost_as_good() -> None:
    """Values are fitted to what the folded keys do."""
    torch.manual_seed(1)
    block = block_of(4.0)
    exact = exact_attention(block)
    indices = exact.scores.argsort(dim=1, descending=True)[:, :10]
    count = torch.full((B,), 10)
    plain = fit(block, indices, count, exact=exact)
    folded = fit(block, indices, count, exact=exact, rotations=STILL)
    without = fit(block, indices, count, FitOptions(fit_bias=False), exact=exact)
    assert plain.fold_error is None
    assert folded.fold_error is not None
    assert not folded.bias.any()
    assert folded.mass_error.mean() < 1.05 * plain.mass_error.mean() < 0.7 * without.mass_error.mean()
    assert folded.output_error.mean() < 1.05 * plain.output_error.mean()
