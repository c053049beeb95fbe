"""Attention over ragged, biased slots and an exact tail, compared with one plain softmax over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from am_memory.engines import partwise
from am_memory.engines.partwise import merge, partial_attention
from am_memory.engines.transformers.attention import attend, attention_forward
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.layers import CompactableLayer
from am_memory.kv_cache.slots import PINNED_RANK, Slots

NUM_HEADS, HEAD_DIM = 3, 16
SCALING = 0.3
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def random_slots(counts: list[int], dtype: torch.dtype = torch.float32) -> Slots:
    heads = [
        Slots(
            key=torch.randn(count, HEAD_DIM).to(dtype),
            value=torch.randn(count, HEAD_DIM).to(dtype),
            bias=(3 * torch.rand(count)).to(dtype),
            positions=torch.arange(count, dtype=torch.int32),
            ranks=torch.full((count,), PINNED_RANK, dtype=torch.int32),
            cu_slots=(0, count),
        )
        for count in counts
    ]
    return Slots.stack(heads)


def random_qkv(
    num_tokens: int, tail_tokens: int, groups: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    query = 2 * torch.randn(1, NUM_HEADS * groups, num_tokens, HEAD_DIM)
    key, value = torch.randn(2, 1, NUM_HEADS, tail_tokens, HEAD_DIM)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, slots: Slots | None) -> tuple[Tensor, Tensor]:
    """The definition: every head padded to the longest with -inf bias, one softmax in float64."""
    groups, num_tokens, tail_tokens = query.shape[1] // NUM_HEADS, query.shape[2], key.shape[2]
    visible = torch.ones(num_tokens, tail_tokens, dtype=torch.bool).tril(tail_tokens - num_tokens)
    bias = torch.zeros(num_tokens, tail_tokens).masked_fill(~visible, -torch.inf).expand(NUM_HEADS, -1, -1)
    key, value = key[0].double(), value[0].double()
    if slots is not None:
        longest = max(head.key.shape[2] for head in slots.heads)

        def pad(pieces: list[Tensor], fill: float) -> Tensor:
            return torch.stack([
                torch.cat([piece.double(), piece.new_full((longest - len(piece), *piece.shape[1:]), fill).double()])
                for piece in pieces
            ])  # fmt: skip

        key = torch.cat([pad([head.key[0, 0] for head in slots.heads], 0), key], dim=1)
        value = torch.cat([pad([head.value[0, 0] for head in slots.heads], 0), value], dim=1)
        slot_bias = pad([head.bias[0, 0, 0] for head in slots.heads], -torch.inf)
        bias = torch.cat([slot_bias[:, None].expand(-1, num_tokens, -1), bias], dim=2)
    key, value, bias = (tensor.repeat_interleave(groups, dim=0) for tensor in (key, value, bias))
    scores = query[0].double() @ key.transpose(1, 2) * SCALING + bias
    return (scores.softmax(-1) @ value)[None], scores.logsumexp(-1)[None]


def assert_is_padded_attention(query: Tensor, key: Tensor, value: Tensor, slots: Slots | None) -> None:
    output, log_mass = attend(query, key, value, slots, SCALING)
    expected, expected_mass = padded_attention(query, key, value, slots)
    tolerance = TOLERANCE[query.dtype]
    assert output.dtype == query.dtype
    assert log_mass.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_mass.double(), expected_mass, rtol=0, atol=5 * tolerance)


@DTYPES
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 63])
@pytest.mark.parametrize("num_past", [0, 1, 40])
def test_an_exact_tail_is_causal_attention(num_past: int, num_tokens: int, groups: int, dtype: torch.dtype) -> None:
    assert_is_padded_attention(*random_qkv(num_tokens, num_past + num_tokens, groups, dtype), None)


@DTYPES
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize("num_tokens", [1, 2, 63])
@pytest.mark.parametrize("counts", [[5, 5, 5], [1, 63, 20], [0, 7, 0], [0, 0, 0], [500, 0, 3]], ids=str)
def test_ragged_slots_equal_padding_with_a_bias_of_minus_infinity(
    counts: list[int], num_tokens: int, groups: int, dtype: torch.dtype
) -> None:
    assert_is_padded_attention(*random_qkv(num_tokens, num_tokens + 9, groups, dtype), random_slots(counts, dtype))


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_slots_may_be_all_there_is_before_the_new_tokens(num_tokens: int) -> None:
    assert_is_padded_attention(*random_qkv(num_tokens, num_tokens), random_slots([4, 0, 9]))


def test_scores_of_hundreds_do_not_overflow() -> None:
    query, key, value = random_qkv(5, 20)
    query, slots = 100 * query, random_slots([4, 0, 9])
    output, log_mass = attend(query, key, value, slots, SCALING)
    expected, expected_mass = padded_attention(query, key, value, slots)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(log_mass.double(), expected_mass, rtol=1e-6, atol=0)


def test_the_order_of_slots_does_not_matter() -> None:
    query, key, value = random_qkv(5, 9)
    slots = random_slots([30, 0, 7])
    order = torch.cat([torch.randperm(30), 30 + torch.randperm(7)])
    shuffled = Slots(*(tensor[order] for tensor in slots.fields), slots.cu_slots)
    one, other = attend(query, key, value, slots, SCALING), attend(query, key, value, shuffled, SCALING)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_slot_of_bias_log_n_weighs_as_n_equal_entries() -> None:
    query, key, value = random_qkv(3, 4)
    one = random_slots([6, 6, 6])
    weighted = Slots(one.key, one.value, torch.full_like(one.bias, 2).log(), one.positions, one.ranks, one.cu_slots)
    plain = Slots(one.key, one.value, torch.zeros_like(one.bias), one.positions, one.ranks, one.cu_slots)
    twice = Slots.concat([plain, plain])
    torch.testing.assert_close(
        attend(query, key, value, weighted, SCALING), attend(query, key, value, twice, SCALING), rtol=0, atol=1e-6
    )


# The parts


@DTYPES
def test_merged_parts_equal_attention_over_the_union(dtype: torch.dtype) -> None:
    query = torch.randn(1, NUM_HEADS, 8, HEAD_DIM).to(dtype)
    key, value = torch.randn(2, 1, NUM_HEADS, 100, HEAD_DIM).to(dtype)
    bounds = [0, 1, 30, 63, 100]
    parts = [
        partial_attention(query, key[:, :, start:end], value[:, :, start:end], None, SCALING)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    output, log_mass = merge(parts)
    expected, expected_mass = partial_attention(query, key, value, None, SCALING)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_mass, expected_mass, rtol=0, atol=tolerance)


def test_a_part_without_mass_does_not_count() -> None:
    output, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    nothing = torch.zeros_like(output), torch.full_like(lse, -torch.inf)
    for parts in ([(output, lse), nothing], [nothing, (output, lse)]):
        merged, log_mass = merge(parts)
        torch.testing.assert_close(merged, output)
        torch.testing.assert_close(log_mass, lse)


@DTYPES
@pytest.mark.parametrize(("has_bias", "is_causal"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("num_keys", [1, 63, 500])
def test_the_kernel_equals_the_plain_definition(
    num_keys: int, has_bias: bool, is_causal: bool, dtype: torch.dtype
) -> None:
    query = torch.randn(1, NUM_HEADS, num_keys if is_causal else 9, HEAD_DIM).to(dtype)
    key, value = torch.randn(2, 1, NUM_HEADS, num_keys, HEAD_DIM).to(dtype)
    bias = torch.randn(1, 1, 1, num_keys).to(dtype) if has_bias else None
    actual = partial_attention(query, key, value, bias, SCALING, is_causal=is_causal)
    plain = partwise.plain_partial_attention(query, key, value, bias, SCALING, is_causal=is_causal)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual[0], plain[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(actual[1], plain[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_plain_path_gives_the_same_in_blocks(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    query, (key, value) = torch.randn(1, NUM_HEADS, 63, HEAD_DIM), torch.randn(2, 1, NUM_HEADS, 63, HEAD_DIM)
    whole = partwise.plain_partial_attention(query, key, value, None, SCALING, is_causal=is_causal)
    monkeypatch.setattr(partwise, "MAX_SCORES", 10 * NUM_HEADS * 63)
    blocks = partwise.plain_partial_attention(query, key, value, None, SCALING, is_causal=is_causal)
    torch.testing.assert_close(blocks, whole)


# The interface


class Module(torch.nn.Module):
    num_key_value_groups = 2


def forward(layer: CompactableLayer, num_tokens: int = 3, **kwargs: object) -> Tensor:
    query, key, value = random_qkv(num_tokens, num_tokens)
    return attention_forward(Module(), query, *layer.update(key, value), kwargs.pop("mask", None), SCALING, **kwargs)[0]


def test_queries_and_their_mass_go_to_whoever_listens() -> None:
    layer, heard = CompactableLayer(), []
    layer.query_sink = lambda query, log_mass: heard.append((query, log_mass))
    torch.manual_seed(1)
    query, key, value = random_qkv(5, 5)
    attention_forward(Module(), query, *layer.update(key, value), None, SCALING)
    (grouped, log_mass) = heard[0]
    assert grouped.shape == (NUM_HEADS, 2, 5, HEAD_DIM)
    assert torch.equal(grouped.flatten(0, 1), query[0])
    expected = padded_attention(query, key, value, None)[1][0].float()
    torch.testing.assert_close(log_mass.flatten(0, 1), expected)


def test_the_softmax_scale_is_the_models_or_that_of_the_head() -> None:
    layer = CompactableLayer()
    forward(layer)
    assert layer.scaling == SCALING
    query, key, value = random_qkv(1, 1)
    attention_forward(Module(), query, *layer.update(key, value), None, None)
    assert layer.scaling == HEAD_DIM**-0.5


def test_keys_of_another_cache_go_to_transformers_own_attention() -> None:
    query, key, value = random_qkv(5, 5)
    output, weights = attention_forward(Module(), query, key, value, None, SCALING)
    assert weights is None
    torch.testing.assert_close(output.transpose(1, 2), padded_attention(query, key, value, None)[0].float())


def test_a_mask_is_refused() -> None:
    with pytest.raises(UnsupportedOperation, match="without padding"):
        forward(CompactableLayer(), mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_mask_that_hides_later_tokens_alone_changes_nothing(dtype: torch.dtype, num_tokens: int) -> None:
    """Gemma 4 makes one for every text if its images are not causal."""
    mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    query, key, value = random_qkv(num_tokens, num_tokens)
    outputs = [
        attention_forward(Module(), query, *CompactableLayer().update(key, value), given, SCALING)[0]
        for given in (mask, None)
    ]
    assert torch.equal(*outputs)
    for hidden in range(num_tokens):
        holed = mask.clone()
        holed[..., -1, hidden] = False if dtype == torch.bool else -torch.inf
        with pytest.raises(UnsupportedOperation, match="without padding"):
            attention_forward(Module(), query, *CompactableLayer().update(key, value), holed, SCALING)


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "block_indices", "not_yet_invented"])
def test_an_argument_of_attention_that_is_not_ours_is_refused(name: str) -> None:
    """Sparse attention was accepted where the first tokens are all selected: its arguments were ignored."""
    with pytest.raises(UnsupportedOperation, match=name):
        forward(CompactableLayer(), **{name: torch.ones(1)})
    forward(CompactableLayer(), **{name: None})
