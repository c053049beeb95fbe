"""Queries that spend only a share of their attention on the block, and keys that bring a bias."""

import pytest
import torch

from am_memory.solver import OMP, Block, FitOptions, HighestAttention, attention_scores, exact_attention, fit, naive
from am_memory.solver.exact import SMALL_BLOCK_TOKENS, fit_weights


@pytest.fixture
def block(make_block) -> Block:
    """Two heads of a block beside which there is more; the second has 41 keys, of which some stand for several."""
    plain = make_block(2, 63, 200)
    generator = torch.Generator().manual_seed(1)
    key_bias = torch.rand(2, 63, generator=generator)
    key_bias[1, 41:] = -torch.inf
    biased = Block(plain.query, plain.key, plain.value, plain.scaling, key_bias=key_bias)
    log_mass = exact_attention(biased).log_mass + 3 * torch.rand(2, 200, generator=generator)
    return Block(plain.query, plain.key, plain.value, plain.scaling, log_mass, key_bias)


def heads(block: Block) -> list[naive.Head]:
    return [naive.Head.of(block, index) for index in range(block.num_heads)]


def test_queries_count_by_their_share_of_attention(block):
    share = torch.stack([head.share for head in heads(block)])
    assert share.min() < 0.06
    assert 0.9 < share.max() < 1
    weight = torch.stack([head.weight for head in heads(block)])
    torch.testing.assert_close(exact_attention(block).weight.double(), weight, rtol=1e-4, atol=0)


def test_in_a_long_block_the_share_is_the_weight():
    share = torch.tensor([[0.5, 0.1, 0.001, 0.0]])
    weight = fit_weights(share, torch.tensor([100 * SMALL_BLOCK_TOKENS]))
    torch.testing.assert_close(weight, 2 * share, rtol=1e-2, atol=0)


def test_in_a_short_block_queries_of_a_small_share_count_too():
    share = torch.tensor([[0.5, 0.1, 0.001]])
    weights = fit_weights(share.expand(3, -1), torch.tensor([1, SMALL_BLOCK_TOKENS // 4, SMALL_BLOCK_TOKENS]))
    assert weights[0].min() > 0.9
    mean = share.mean()
    torch.testing.assert_close(weights[2], share[0] / (share[0] + mean) * (0.5 + mean) / 0.5)
    assert (weights.diff(dim=0) <= 0).all()


def test_queries_without_any_attention_on_a_block_weigh_nothing():
    assert fit_weights(torch.zeros(1, 3), torch.tensor([10])).tolist() == [[0, 0, 0]]


def test_scores_are_the_attention_that_keys_get(block):
    expected = torch.stack([naive.attention_scores(head) for head in heads(block)])
    torch.testing.assert_close(attention_scores(block).double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("is_relative", [True, False])
def test_omp_picks_the_keys_of_the_definition(block, is_relative):
    indices = OMP(relative_mass=is_relative)(block, attention_scores(block), torch.tensor([20, 20]))
    assert indices.tolist() == [naive.omp(head, 20, is_relative) for head in heads(block)]


@pytest.mark.parametrize("is_relative", [True, False])
def test_the_fit_is_the_one_of_the_definition(block, is_relative):
    slots = torch.tensor([10, 10])
    indices = HighestAttention()(block, attention_scores(block), slots)
    result = fit(block, indices, slots, FitOptions(relative_mass=is_relative))
    for index, head in enumerate(heads(block)):
        kept = indices[index].tolist()
        log_w, value = naive.compact(head, kept, is_relative=is_relative)
        bias = block.key_bias[index, kept].double() + log_w
        mass, output = naive.errors(head, head.L[:, kept] + log_w, value)
        torch.testing.assert_close(result.bias[index].double(), bias, rtol=0, atol=2e-3)
        torch.testing.assert_close(result.value[index].double(), value, rtol=0, atol=2e-3)
        torch.testing.assert_close(result.mass_error[index].double(), mass, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(result.output_error[index].double(), output, rtol=1e-3, atol=1e-6)


def test_keeping_every_key_changes_nothing(block):
    every = torch.arange(63).expand(2, -1)
    result = fit(block, every, block.num_keys)
    torch.testing.assert_close(result.bias, block.key_bias, rtol=0, atol=2e-3)
    torch.testing.assert_close(result.value[0], block.value[0], rtol=0, atol=2e-3)
    torch.testing.assert_close(result.value[1, :41], block.value[1, :41], rtol=0, atol=2e-3)


def test_keys_of_no_weight_are_as_good_as_absent(block):
    slots = torch.tensor([10, 10])
    indices = HighestAttention()(block, attention_scores(block), slots)
    together = fit(block, indices, slots)
    short = Block(
        block.query[1:],
        block.key[1:, :41],
        block.value[1:, :41],
        block.scaling,
        block.log_mass[1:],
        block.key_bias[1:, :41],
    )
    alone = fit(short, indices[1:], slots[1:])
    torch.testing.assert_close(together.bias[1], alone.bias[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(together.value[1], alone.value[0], rtol=0, atol=1e-4)


def test_a_share_that_all_queries_have_in_common_does_not_matter(make_block):
    """Padding once brought a 1 into systems whose entries were small, and damped them by its scale."""
    plain = make_block(2, 200, 300)
    log_mass = exact_attention(plain).log_mass + 12
    slots = torch.tensor([40, 20])
    indices = HighestAttention()(plain, attention_scores(plain), slots)
    shared = fit(Block(plain.query, plain.key, plain.value, plain.scaling, log_mass), indices, slots)
    alone = fit(plain, indices, slots)
    torch.testing.assert_close(shared.bias, alone.bias, rtol=0, atol=1e-2)
    torch.testing.assert_close(shared.value, alone.value, rtol=0, atol=1e-2)
    torch.testing.assert_close(shared.mass_error, alone.mass_error, rtol=1e-3, atol=0)
    torch.testing.assert_close(shared.output_error, alone.output_error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("has_log_mass", [True, False])
def test_a_head_without_keys_is_empty_and_leaves_the_others_alone(make_block, has_log_mass):
    plain = make_block(2)
    key_bias = torch.zeros(2, 63)
    key_bias[1] = -torch.inf
    log_mass = exact_attention(plain).log_mass if has_log_mass else None
    block = Block(plain.query, plain.key, plain.value, plain.scaling, log_mass, key_bias)
    scores = attention_scores(block)
    assert (scores[1] == 0).all()
    slots = torch.tensor([9, 0])
    for selection in (HighestAttention(), OMP()):
        result = fit(block, selection(block, scores, slots), slots)
        assert result.value.isfinite().all()
        assert (result.bias[1] == -torch.inf).all()
        assert result.mass_error.isfinite().all()
        assert result.output_error.isfinite().all()


def test_queries_that_attend_elsewhere_do_not_count(make_block):
    plain = make_block(1)
    log_mass = exact_attention(plain).log_mass
    log_mass[:, 50:] += 1000.0
    slots, indices = torch.tensor([9]), torch.arange(9)[None]
    among_others = fit(Block(plain.query, plain.key, plain.value, plain.scaling, log_mass), indices, slots)
    alone = fit(Block(plain.query[:, :50], plain.key, plain.value, plain.scaling), indices, slots)
    torch.testing.assert_close(among_others.bias, alone.bias, rtol=0, atol=1e-3)
    torch.testing.assert_close(among_others.value, alone.value, rtol=0, atol=1e-3)
    torch.testing.assert_close(among_others.mass_error, alone.mass_error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(among_others.output_error, alone.output_error, rtol=1e-3, atol=1e-5)
