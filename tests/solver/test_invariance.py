"""What may not matter: the order of keys and slots, what all keys share, the neighbours in a batch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from am_memory.solver import OMP, Block, FitOptions, HighestAttention, attention_scores, fit

# Without a pull, the biases of few queries are determined only up to rounding.
BIAS_RIDGE = 1e-2

cases = given(seed=st.integers(0, 10**6), seq_len=st.integers(1, 70), num_queries=st.integers(1, 90), data=st.data())
quick = settings(max_examples=15, deadline=None)


def fit_highest(block: Block, num_slots: int):
    slots = torch.full((block.num_heads,), num_slots)
    indices = HighestAttention()(block, attention_scores(block), slots)
    return indices, fit(block, indices, slots, FitOptions(bias_ridge=BIAS_RIDGE))


@quick
@cases
def test_the_order_of_the_keys_does_not_matter(make_block, seed, seq_len, num_queries, data):
    num_slots = data.draw(st.integers(1, seq_len))
    block = make_block(2, seq_len, num_queries, seed=seed)
    order = torch.randperm(seq_len, generator=torch.Generator().manual_seed(seed))
    indices, result = fit_highest(block, num_slots)
    shuffled = Block(block.query, block.key[:, order], block.value[:, order], block.scaling)
    slots = torch.full((2,), num_slots)
    again = fit(shuffled, order.argsort()[indices], slots, FitOptions(bias_ridge=BIAS_RIDGE))
    torch.testing.assert_close(again.mass_error, result.mass_error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.output_error, result.output_error, rtol=1e-3, atol=1e-4)


@quick
@cases
def test_the_order_of_the_slots_does_not_matter(make_block, seed, seq_len, num_queries, data):
    num_slots = data.draw(st.integers(1, seq_len))
    block = make_block(2, seq_len, num_queries, seed=seed)
    indices, result = fit_highest(block, num_slots)
    again = fit(block, indices.flip(1), torch.full((2,), num_slots), FitOptions(bias_ridge=BIAS_RIDGE))
    torch.testing.assert_close(again.mass_error, result.mass_error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.output_error, result.output_error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again.value.flip(1), result.value, rtol=0, atol=1e-3)


@quick
@cases
def test_a_vector_added_to_every_key_does_not_matter(make_block, seed, seq_len, num_queries, data):
    """It shifts all logits of a query alike, as some models' key biases do by hundreds."""
    num_slots = data.draw(st.integers(1, seq_len))
    block = make_block(2, seq_len, num_queries, seed=seed)
    indices, result = fit_highest(block, num_slots)
    shifted = Block(block.query, block.key + 3.0, block.value, block.scaling)
    again = fit(shifted, indices, torch.full((2,), num_slots), FitOptions(bias_ridge=BIAS_RIDGE))
    torch.testing.assert_close(again.mass_error, result.mass_error, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(again.output_error, result.output_error, rtol=1e-2, atol=1e-3)


@quick
@cases
def test_scaled_values_give_scaled_values(make_block, seed, seq_len, num_queries, data):
    num_slots = data.draw(st.integers(1, seq_len))
    block = make_block(1, seq_len, num_queries, seed=seed)
    _, result = fit_highest(block, num_slots)
    _, doubled = fit_highest(Block(block.query, block.key, 2 * block.value, block.scaling), num_slots)
    torch.testing.assert_close(doubled.value, 2 * result.value, rtol=0, atol=1e-4)
    torch.testing.assert_close(doubled.bias, result.bias, rtol=0, atol=0)


@quick
@cases
def test_a_smaller_budget_picks_a_prefix_of_a_larger_one(make_block, seed, seq_len, num_queries, data):
    num_slots = data.draw(st.integers(1, seq_len))
    block = make_block(1, seq_len, num_queries, seed=seed)
    scores = attention_scores(block)
    for selection in (HighestAttention(), OMP()):
        more = selection(block, scores, torch.tensor([seq_len]))
        fewer = selection(block, scores, torch.tensor([num_slots]))
        if selection.name == "omp" and num_queries < num_slots:
            continue  # past the rank of the system, the scores decide, and the rest is not the pursuit's order
        assert more[0, :num_slots].tolist() == fewer[0].tolist()
