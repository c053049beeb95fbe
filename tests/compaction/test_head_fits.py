"""Heads are fitted in batches of like size, and each as if it were alone."""

from __future__ import annotations

import torch
from policies import plain_policy

from am_memory.compaction.head_fits import batches_of_like_size, fit_batch
from am_memory.compaction.scoring import ScoredHead
from am_memory.kv_cache.slots import Segment
from am_memory.solver import Block, exact_attention

POLICY = plain_policy()


def some_heads(counts: list[int], seq_len: int = 40) -> list[ScoredHead]:
    """Heads that get these numbers of slots out of a segment of 1,000."""
    heads = []
    for count in counts:
        block = Block(*torch.randn(3, 1, seq_len, 8), 1.0)
        ranks = torch.where(torch.arange(seq_len) < count, 0, 1000)
        heads.append(ScoredHead(0, block, exact_attention(block), torch.arange(seq_len), ranks))
    return heads


def test_batches_hold_every_head_once_and_little_padding() -> None:
    heads = some_heads([1, 300, 12, 500, 480, 2, 320, 90, 1], seq_len=600)
    batches = list(batches_of_like_size(heads, 1000))
    assert sorted(id(head) for batch in batches for head in batch) == sorted(map(id, heads))
    counts = [sorted(int((head.ranks < 1000).sum()) for head in batch) for batch in batches]
    assert counts == [[480, 500], [300, 320], [90], [12], [1, 1, 2]]


def test_heads_of_different_shapes_are_never_in_one_batch() -> None:
    batches = list(batches_of_like_size([*some_heads([5, 5], 30), *some_heads([5], 31)], 1000))
    assert sorted(len(batch) for batch in batches) == [1, 2]


def test_a_batch_fits_each_head_as_if_it_were_alone() -> None:
    torch.manual_seed(0)
    heads, segment = some_heads([9, 7, 12]), Segment(0, 40, 1000)
    together = fit_batch(heads, segment, POLICY)
    for head, slots in zip(heads, together.slots, strict=True):
        (alone,) = fit_batch([head], segment, POLICY).slots
        for one, other in zip(slots.fields, alone.fields, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_held_out_error_is_what_the_definition_gives() -> None:
    """Softmax over the fitted slots, by hand, on every eighth query."""
    (head,) = some_heads([9])
    policy = POLICY.model_copy(update={"max_error": 1.0})
    batch = fit_batch([head], Segment(0, 40, 1000), policy)
    held = slice(7, None, 8)
    logits = head.block.query[0, held] @ batch.fit.key[0].T * head.block.scaling + batch.fit.bias[0]
    output = logits.softmax(-1) @ batch.fit.value[0]
    weight = head.exact.weight[0, held, None]
    exact = head.exact.output[0, held]
    expected = ((output - exact) * weight).square().sum().sqrt() / (exact * weight).square().sum().sqrt()
    torch.testing.assert_close(batch.held_out_error[0], expected, rtol=1e-4, atol=1e-6)
