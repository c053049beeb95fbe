"""Budgets are rankings: a size cuts them, whatever came before."""

from __future__ import annotations

import pytest
import torch

from am_memory import MemoryPolicy
from am_memory.budgets import adaptive_ranks, head_ranks, shared_ranks, uniform_ranks


@pytest.mark.parametrize("budget", [adaptive_ranks, uniform_ranks])
@pytest.mark.parametrize(("num_heads", "seq_len"), [(1, 1), (6, 63), (5, 500)])
def test_every_slot_has_a_rank_of_its_own_and_a_head_takes_its_best_first(budget, num_heads: int, seq_len: int) -> None:
    ranks = budget(torch.rand(num_heads, seq_len), 2)
    assert ranks.flatten().sort().values.tolist() == list(range(num_heads * seq_len))
    assert (ranks.diff(dim=1) > 0).all()


def test_the_adaptive_budget_follows_the_scores_of_all_heads() -> None:
    scores = torch.tensor([[9.0, 1.0, 8.0], [7.0, 0.5, 0.1]])
    assert adaptive_ranks(scores, 1).tolist() == [[0, 2, 3], [1, 4, 5]]


def test_no_head_gets_more_before_every_head_has_its_least() -> None:
    scores = torch.rand(7, 40)
    scores[3] *= 1e-6
    assert ((adaptive_ranks(scores, 4) < 28).sum(dim=1) == 4).all()


def test_the_uniform_budget_never_differs_by_more_than_one() -> None:
    counts = (uniform_ranks(torch.rand(6, 50), 1) < 100).sum(dim=1)
    assert counts.max() - counts.min() <= 1


def test_equal_scores_are_ranked_alike_each_time() -> None:
    assert torch.equal(adaptive_ranks(torch.ones(4, 30), 2), adaptive_ranks(torch.ones(4, 30), 2))


def test_a_policys_budget_is_the_one_that_it_names() -> None:
    scores = torch.rand(6, 50)
    adaptive, uniform = (MemoryPolicy(head_budget=name) for name in ("adaptive", "uniform"))
    assert torch.equal(head_ranks(scores, adaptive), adaptive_ranks(scores, 1))
    assert torch.equal(head_ranks(scores, uniform), uniform_ranks(scores, 1))
    assert torch.equal(head_ranks(scores, adaptive, is_shared=True), shared_ranks(scores))
