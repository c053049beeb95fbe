"""Learned attention sinks: a term of each head's softmax that has no value."""

from __future__ import annotations

import pytest
import torch
from test_families import EXPERTS, SIZES, Family, masses_agree
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.attention import attend
from am_memory.engines.transformers.sinks import sdpa_with_sinks, with_sinks

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8


def defined(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention with one more column of scores, whose weight is dropped; and the log of the mass."""
    groups, num_tokens, num_keys = NUM_HEADS // NUM_KV_HEADS, query.shape[2], key.shape[2]
    scores = query @ key.repeat_interleave(groups, dim=1).mT * HEAD_DIM**-0.5
    is_seen = torch.ones(num_tokens, num_keys, dtype=torch.bool).tril(num_keys - num_tokens)
    scores = scores.masked_fill(~is_seen, -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(1, NUM_HEADS, num_tokens, 1)], dim=3)
    weights = scores.softmax(dim=3)[..., :-1]
    return weights @ value.repeat_interleave(groups, dim=1), scores.logsumexp(dim=3)


@pytest.fixture
def case() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(1, NUM_HEADS, 5, HEAD_DIM), (1, NUM_KV_HEADS, 12, HEAD_DIM), (1, NUM_KV_HEADS, 12, HEAD_DIM)]
    return *(torch.randn(shape) for shape in shapes), 2 * torch.randn(NUM_HEADS)


def test_sinks_are_one_more_term_of_the_softmax(case: tuple[Tensor, ...]) -> None:
    *entries, sinks = case
    actual = with_sinks(*attend(*entries, None, HEAD_DIM**-0.5), sinks)
    torch.testing.assert_close(actual, defined(*entries, sinks), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32], ids=str)
def test_a_plain_cache_has_them_too(case: tuple[Tensor, ...], kind: torch.dtype | None) -> None:
    """transformers' sdpa attention ignores sinks: layers with a sliding window would lose them."""
    *entries, sinks = case
    mask = torch.ones(1, 1, 5, 12, dtype=torch.bool).tril(7)
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    actual = sdpa_with_sinks(*entries, None if kind is None else mask, None, sinks)
    torch.testing.assert_close(actual.transpose(1, 2), defined(*entries, sinks)[0], rtol=0, atol=1e-5)


def test_the_mass_of_a_query_includes_its_sink(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Behind slots and exact tokens; a query's share of attention on a block would be too large without it."""
    family = Family("GptOss", {**EXPERTS, "layer_types": ["full_attention"] * SIZES["num_hidden_layers"]})
    engine = TransformersEngine(family.build(), byte_tokenizer)
    cache = masses_agree(engine)
    assert all(layer.sinks is not None for layer in cache.compactable)
