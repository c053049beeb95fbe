"""Attention whose scores are capped, and how the solver sees it."""

from __future__ import annotations

import pytest
import torch
from test_families import SIZES, Family, masses_agree
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from am_memory.engines.transformers import TransformersEngine, capped
from am_memory.kv_cache.slots import Slots
from am_memory.solver import Block, FitOptions, HighestAttention, attention_scores, fit, naive

CAP, SCALING = 0.7, 0.9
GROUPS, NUM_HEADS, HEAD_DIM, NUM_TOKENS = 2, 2, 8, 5


def defined(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention with capped scores and a bias for each key of each KV head, and the log of its mass."""
    key, value, bias = (each.repeat_interleave(GROUPS, dim=1) for each in (key, value, bias))
    scores = CAP * torch.tanh(query @ key.mT * SCALING / CAP) + bias[:, :, None]
    is_seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~is_seen, -torch.inf)
    return scores.softmax(dim=3) @ value, scores.logsumexp(dim=3)


@pytest.mark.parametrize("most_scores", [2**24, 1])
def test_a_cap_comes_before_a_bias(most_scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "MAX_SCORES", most_scores)
    torch.manual_seed(0)
    query = torch.randn(1, GROUPS * NUM_HEADS, NUM_TOKENS, HEAD_DIM)
    key, value = torch.randn(2, 1, NUM_HEADS, 20, HEAD_DIM)
    bias = torch.cat([torch.randn(1, NUM_HEADS, 9), torch.zeros(1, NUM_HEADS, 11)], dim=2)
    slots = Slots.exact(key[0, :, :9], value[0, :, :9], start=0)
    slots = Slots(slots.key, slots.value, bias[0, :, :9].flatten(), slots.positions, slots.ranks, slots.cu_slots)
    actual = capped.attend(query, key[:, :, 9:], value[:, :, 9:], slots, SCALING, CAP)
    torch.testing.assert_close(actual, defined(query, key, value, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [None, torch.bool, torch.float32], ids=str)
def test_a_plain_cache_is_capped_too(kind: torch.dtype | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, GROUPS * NUM_HEADS, NUM_TOKENS, HEAD_DIM)
    key, value = torch.randn(2, 1, NUM_HEADS, 12, HEAD_DIM)
    mask = torch.ones(1, 1, NUM_TOKENS, 12, dtype=torch.bool).tril(7)
    if kind == torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    actual = capped.attend_with_mask(query, key, value, None if kind is None else mask, SCALING, CAP)
    torch.testing.assert_close(actual, defined(query, key, value, torch.zeros(1, NUM_HEADS, 12)), rtol=0, atol=1e-5)


def test_the_fit_of_capped_scores_is_the_one_of_the_definition() -> None:
    torch.manual_seed(0)
    block = Block(torch.randn(2, 100, 16), torch.randn(2, 63, 16), torch.randn(2, 63, 16), 0.5, softcap=1.5)
    expected = torch.stack([naive.attention_scores(naive.Head.of(block, head)) for head in range(2)])
    torch.testing.assert_close(attention_scores(block).double(), expected, rtol=1e-4, atol=1e-7)
    slots = torch.tensor([12, 12])
    indices = HighestAttention()(block, attention_scores(block), slots)
    result = fit(block, indices, slots, FitOptions())
    for head in range(2):
        kept = indices[head].tolist()
        bias, value = naive.compact(naive.Head.of(block, head), kept, is_relative=FitOptions().relative_mass)
        torch.testing.assert_close(result.bias[head].double(), bias, rtol=0, atol=2e-3)
        torch.testing.assert_close(result.value[head].double(), value, rtol=0, atol=2e-3)


def test_the_mass_of_a_query_is_that_of_capped_scores(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    layer_types = ["full_attention"] * SIZES["num_hidden_layers"]  # type: ignore[operator]
    family = Family("Gemma2", {"head_dim": 8, "layer_types": layer_types, "attn_logit_softcapping": 0.5})
    engine = TransformersEngine(family.build(), byte_tokenizer)
    cache = masses_agree(engine)
    assert engine.branches(cache, [[1], [2]]) is None
