import pytest
import torch

from am_memory.solver import HighestAttention, attention_scores, naive


@pytest.mark.parametrize(("seq_len", "num_slots"), [(1, 1), (63, 1), (63, 20), (500, 77)])
def test_highest_attention_keeps_the_keys_of_the_definition(make_block, seq_len, num_slots):
    block = make_block(2, seq_len)
    scores = attention_scores(block)
    indices = HighestAttention()(block, scores, torch.tensor([num_slots, num_slots]))
    assert indices.tolist() == [naive.highest_attention(head, num_slots) for head in scores]


def test_equal_scores_go_to_the_lower_index(make_block):
    scores = torch.tensor([0.5, 0.1]).repeat(250)[None]
    indices = HighestAttention()(make_block(1, 500), scores, torch.tensor([300]))
    assert indices[0].tolist() == [*range(0, 500, 2), *range(1, 100, 2)]


def test_padding_repeats_the_first_index(make_block):
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.1, 0.1]])
    indices = HighestAttention()(make_block(3, 4), scores, torch.tensor([3, 1, 0]))
    assert indices.tolist() == [[3, 2, 1], [0, 0, 0], [1, 1, 1]]
