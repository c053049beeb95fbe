import pytest
import torch

from am_memory.errors import InvalidInput
from am_memory.solver import Block, attention_scores, exact_attention, naive
from am_memory.solver import block as block_module

SIZES = [(1, 1), (1, 5), (63, 1), (63, 100), (500, 257)]  # seq_len, num_queries
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq_len", "num_queries"), SIZES)
def test_scores_are_the_rms_of_the_softmax_weights(make_block, seq_len, num_queries, dtype):
    block = make_block(3, seq_len, num_queries, dtype=dtype)
    expected = [naive.attention_scores(naive.Head.of(block, head)) for head in range(3)]
    torch.testing.assert_close(attention_scores(block).double(), torch.stack(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seq_len", "num_queries"), SIZES)
def test_mass_and_output_are_those_of_the_whole_block(make_block, seq_len, num_queries, dtype):
    block = make_block(1, seq_len, num_queries, dtype=dtype)
    logits = naive.Head.of(block, 0).L
    exact = exact_attention(block)
    torch.testing.assert_close(exact.max_logit[0].double(), logits.amax(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.log_mass[0].double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    output = torch.softmax(logits, 1) @ block.value[0].double()
    torch.testing.assert_close(exact.output[0].double(), output, rtol=1e-4, atol=1e-5)


def test_results_do_not_depend_on_the_chunks(make_block, monkeypatch):
    block = make_block()
    whole = exact_attention(block)
    monkeypatch.setattr(block_module, "MAX_CHUNK_ELEMENTS_CPU", 2 * 63 * 7)
    chunked = exact_attention(block)
    for field in ("scores", "max_logit", "log_mass", "output"):
        torch.testing.assert_close(getattr(chunked, field), getattr(whole, field))


def test_scores_alone_equal_those_of_the_exact_attention(make_block):
    block = make_block()
    torch.testing.assert_close(attention_scores(block), exact_attention(block).scores)


def test_logits_in_the_thousands_do_not_overflow(make_block):
    block = make_block()
    exact = exact_attention(Block(100 * block.query, 10 * block.key, block.value, block.scaling))
    assert exact.max_logit.max() > 1000
    assert all(tensor.isfinite().all() for tensor in (exact.scores, exact.log_mass, exact.output))


def test_scores_of_pooled_query_heads_are_the_rms_of_the_heads_scores(make_block):
    block = make_block(1, num_queries=60)
    heads = [Block(query, block.key, block.value, block.scaling) for query in block.query.chunk(3, dim=1)]
    each = torch.stack([attention_scores(head) for head in heads])
    torch.testing.assert_close(attention_scores(block), each.square().mean(0).sqrt())


@pytest.mark.parametrize(("seq_len", "num_queries"), [(0, 5), (5, 0)])
def test_a_block_without_keys_or_queries_is_refused(seq_len, num_queries):
    with pytest.raises(InvalidInput, match="nothing to match"):
        Block(torch.zeros(1, num_queries, 4), torch.zeros(1, seq_len, 4), torch.zeros(1, seq_len, 4), 1.0)


def test_queries_of_another_head_dim_are_refused():
    with pytest.raises(InvalidInput, match=r"query \(1, 2, 3\)"):
        Block(torch.zeros(1, 2, 3), torch.zeros(1, 5, 4), torch.zeros(1, 5, 4), 1.0)


def test_values_of_another_length_are_refused():
    with pytest.raises(InvalidInput, match=r"value \(1, 6, 4\)"):
        Block(torch.zeros(1, 2, 4), torch.zeros(1, 5, 4), torch.zeros(1, 6, 4), 1.0)
