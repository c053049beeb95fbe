from dataclasses import replace

import pytest
import torch
from torch import Tensor

from am_memory.errors import InvalidInput
from am_memory.solver import Block, Fit, FitOptions, HighestAttention, attention_scores, exact_attention, fit, naive

FIELDS = ("key", "bias", "value", "mass_error", "output_error")


def select(block: Block, num_slots: list[int]) -> tuple[Tensor, Tensor]:
    slots = torch.tensor(num_slots)
    return HighestAttention()(block, attention_scores(block), slots), slots


def head_of(block: Block, head: int) -> Block:
    one = slice(head, head + 1)
    return Block(block.query[one], block.key[one], block.value[one], block.scaling)


def assert_same(first: Fit, second: Fit, atol: float = 1e-5) -> None:
    for field in FIELDS:
        torch.testing.assert_close(getattr(first, field), getattr(second, field), rtol=1e-4, atol=atol)


def assert_reports_its_errors(block: Block, result: Fit) -> None:
    for index in range(block.num_heads):
        head = naive.Head.of(block, index)
        logits = head.Q @ result.key[index].double().T * block.scaling + result.bias[index]
        mass, output = naive.errors(head, logits, result.value[index])
        torch.testing.assert_close(result.mass_error[index].double(), mass, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.output_error[index].double(), output, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("seq_len", "num_queries", "num_slots"), [(1, 1, 1), (1, 5, 1), (63, 40, 1), (63, 100, 12), (500, 257, 7)]
)
def test_the_fit_is_the_one_of_the_definition(make_block, seq_len, num_queries, num_slots, dtype, is_relative):
    block = make_block(2, seq_len, num_queries, dtype=dtype)
    indices, slots = select(block, [num_slots] * 2)
    result = fit(block, indices, slots, FitOptions(relative_mass=is_relative))
    for head in range(2):
        kept = indices[head].tolist()
        bias, value = naive.compact(naive.Head.of(block, head), kept, is_relative=is_relative)
        assert (result.key[head] == block.key[head, kept]).all()
        torch.testing.assert_close(result.bias[head].double(), bias, rtol=0, atol=2e-3)
        torch.testing.assert_close(result.value[head].double(), value, rtol=0, atol=2e-3)


@pytest.mark.parametrize("switches", [{}, {"fit_bias": False}, {"fit_values": False}, {"relative_mass": False}])
def test_the_reported_errors_are_those_of_the_returned_tensors(make_block, switches):
    block = make_block(2, 300, 400)
    result = fit(block, *select(block, [40, 40]), FitOptions(**switches))
    assert_reports_its_errors(block, result)


@pytest.mark.parametrize("is_relative", [True, False])
@pytest.mark.parametrize(("seq_len", "num_queries"), [(1, 1), (63, 20), (63, 500), (400, 257)])
def test_keeping_every_key_changes_nothing(make_block, seq_len, num_queries, is_relative):
    block = make_block(2, seq_len, num_queries)
    every = torch.arange(seq_len).expand(2, -1)
    result = fit(block, every, torch.full((2,), seq_len), FitOptions(relative_mass=is_relative))
    torch.testing.assert_close(result.key, block.key)
    torch.testing.assert_close(result.bias, torch.zeros_like(result.bias), rtol=0, atol=2e-3)
    torch.testing.assert_close(result.value, block.value, rtol=0, atol=2e-3)
    assert (result.mass_error < 1e-5).all()
    assert (result.output_error < 1e-5).all()


def test_a_ragged_batch_is_the_fit_of_each_head_alone(make_block):
    block = make_block(4, 200, 300)
    num_slots = [30, 1, 77, 64]
    indices, slots = select(block, num_slots)
    together = fit(block, indices, slots)
    for head, count in enumerate(num_slots):
        alone = fit(head_of(block, head), indices[head, None, :count], slots[head, None])
        torch.testing.assert_close(together.bias[head, :count], alone.bias[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(together.value[head, :count], alone.value[0], rtol=0, atol=2e-3)
        torch.testing.assert_close(together.mass_error[head], alone.mass_error[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.output_error[head], alone.output_error[0], rtol=1e-4, atol=1e-6)


def test_padding_is_empty(make_block):
    block = make_block(2)
    result = fit(block, *select(block, [9, 4]))
    assert (result.key[1, 4:] == 0).all()
    assert (result.bias[1, 4:] == -torch.inf).all()
    assert (result.value[1, 4:] == 0).all()


def test_indices_in_padding_are_never_read(make_block):
    block = make_block(2)
    indices, slots = select(block, [9, 4])
    poisoned = indices.clone()
    poisoned[1, 4:] = torch.tensor([-1, 10**12, 63, -(10**12), 0])
    assert_same(fit(block, poisoned, slots), fit(block, indices, slots), atol=0)


def test_a_head_without_slots_is_empty_and_leaves_the_others_alone(make_block):
    block = make_block(2)
    indices, slots = select(block, [9, 0])
    result = fit(block, indices, slots)
    assert (result.bias[1] == -torch.inf).all()
    assert result.mass_error[1] == 1
    assert result.output_error[1] == 1
    alone = fit(head_of(block, 0), indices[:1], slots[:1])
    torch.testing.assert_close(result.value[0], alone.value[0], rtol=0, atol=1e-5)


def test_without_fits_it_is_eviction(make_block):
    block = make_block(2)
    indices, slots = select(block, [9, 9])
    result = fit(block, indices, slots, FitOptions(fit_bias=False, fit_values=False))
    assert (result.bias == 0).all()
    torch.testing.assert_close(result.value, block.value.gather(1, indices[:, :, None].expand(-1, -1, 16)))


def test_each_fit_lowers_its_error(make_block):
    block = make_block(2, 300, 400)
    indices, slots = select(block, [40, 40])
    evicted = fit(block, indices, slots, FitOptions(fit_bias=False, fit_values=False))
    biased = fit(block, indices, slots, FitOptions(fit_values=False))
    fitted = fit(block, indices, slots)
    assert (biased.mass_error < 0.7 * evicted.mass_error).all()
    assert (fitted.output_error < 0.7 * biased.output_error).all()


def test_the_bias_is_at_least_as_good_as_least_squares_and_a_clamp(make_block):
    """The official code clamps the unbounded solution, which is not the optimum within the bounds."""
    block = make_block(1, 300, 400)
    indices, slots = select(block, [40])
    result = fit(block, indices, slots, FitOptions(bias_bounds=(-0.5, 0.5)))
    head = naive.Head.of(block, 0)
    columns, mass = naive.mass_system(head, head.weight)
    columns = columns[:, indices[0]]
    low, high = torch.tensor([-0.5, 0.5]).exp().tolist()
    clamped = torch.linalg.lstsq(columns, mass[:, None]).solution[:, 0].clamp(low, high)
    assert result.mass_error[0] < 0.99 * (columns @ clamped - mass).square().mean().sqrt()


def test_biases_keep_within_their_bounds(make_block):
    block = make_block(2, 300, 400)
    result = fit(block, *select(block, [40, 40]), FitOptions(bias_bounds=(-0.25, 0.5)))
    assert result.bias.min() >= -0.25 - 1e-6
    assert result.bias.max() <= 0.5 + 1e-6


@pytest.mark.parametrize("bounds", [(0.1, 3.0), (-3.0, -0.1), (-torch.inf, 3.0)])
def test_bounds_that_exclude_no_bias_or_are_infinite_are_refused(make_block, bounds):
    block = make_block(1)
    with pytest.raises(InvalidInput, match="bias_bounds"):
        fit(block, *select(block, [3]), FitOptions(bias_bounds=bounds))


def test_a_huge_bias_ridge_gives_no_bias(make_block):
    block = make_block(2)
    result = fit(block, *select(block, [9, 9]), FitOptions(bias_ridge=1e9))
    torch.testing.assert_close(result.bias, torch.zeros_like(result.bias), rtol=0, atol=1e-5)


def test_a_huge_ridge_keeps_the_original_values(make_block):
    block = make_block(2)
    indices, slots = select(block, [9, 9])
    result = fit(block, indices, slots, FitOptions(ridge=1e9))
    kept = block.value.gather(1, indices[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(result.value, kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_duplicate_keys_and_fewer_queries_than_slots_have_a_finite_fit(make_block, ridge):
    block = make_block(2, 40, 10)
    twice = Block(block.query, block.key.repeat(1, 2, 1), block.value.repeat(1, 2, 1), block.scaling)
    result = fit(twice, *select(twice, [60, 31]), FitOptions(ridge=ridge))
    assert result.value.isfinite().all()
    assert result.value.abs().max() < 100
    assert (result.output_error < 0.2).all()


def test_queries_that_attend_to_none_of_the_kept_keys_have_a_finite_fit():
    """Their weights on the kept keys underflow float32; relative to each other they still make a softmax."""
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    key = torch.tensor([[[500.0, 0.0], [0.0, 1.0], [0.0, 0.5]]])
    block = Block(query, key, torch.randn(1, 3, 2), 1.0)
    result = fit(block, torch.tensor([[1, 2]]), torch.tensor([2]), FitOptions(fit_bias=False, fit_values=False))
    assert_reports_its_errors(block, result)


def test_queries_of_nan_are_refused(make_block):
    block = make_block(1)
    with pytest.raises(InvalidInput, match="not finite"):
        fit(
            Block(block.query * torch.nan, block.key, block.value, block.scaling),
            torch.tensor([[0, 1]]),
            torch.tensor([2]),
        )


def test_bfloat16_inputs_are_solved_as_the_float32_numbers_they_are(make_block):
    low = make_block(2, dtype=torch.bfloat16)
    high = Block(low.query.float(), low.key.float(), low.value.float(), low.scaling)
    indices, slots = select(low, [9, 9])
    assert_same(fit(low, indices, slots), fit(high, indices, slots), atol=0)


def test_an_exact_attention_at_hand_gives_the_same_fit(make_block):
    block = make_block(2)
    indices, slots = select(block, [9, 9])
    assert_same(fit(block, indices, slots, exact=exact_attention(block)), fit(block, indices, slots), atol=0)


def test_values_may_have_another_width_than_keys(make_block):
    """Columns of the values are fitted apart from each other."""
    block = make_block(2, 40, 30)
    narrow = replace(block, value=block.value[:, :, :3].contiguous())
    indices, num_slots = torch.arange(6).expand(2, -1), torch.tensor([6, 4])
    whole, part = fit(block, indices, num_slots), fit(narrow, indices, num_slots)
    torch.testing.assert_close(part.value, whole.value[:, :, :3])
    torch.testing.assert_close(part.bias, whole.bias)
