"""Cells that all heads share: a slot of every head, or of none."""

from __future__ import annotations

import torch

from am_memory.budgets import shared_ranks


def test_a_slot_comes_to_all_heads_at_once() -> None:
    ranks = shared_ranks(torch.rand(3, 5))
    assert ranks.tolist() == [[2, 5, 8, 11, 14]] * 3


def test_a_segment_gives_each_head_its_share_of_whole_cells() -> None:
    ranks = shared_ranks(torch.rand(3, 5))
    assert [int((ranks < num_slots).sum(dim=1).unique()) for num_slots in (0, 2, 3, 7, 15)] == [0, 0, 1, 2, 5]
