import pytest
import torch

from am_memory.errors import InvalidInput
from am_memory.solver import Block, attention_scores, exact_attention, naive
from am_memory.solver import block as block_module
from am_memory.solver import exact as exact_module

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


ON_GPU = torch.cuda.is_available()
FIELDS = ("scores", "max_logit", "log_mass", "output", "weight")


def on_device(block: Block, **fields: object) -> Block:
    device = "cuda" if ON_GPU else "cpu"
    moved = {name: getattr(block, name).to(device) for name in ("query", "key", "value")}
    extra = {name: field.to(device) for name, field in fields.items()}
    return Block(**moved, scaling=block.scaling, **extra)


def assert_tensor_cores_compute_the_same(block: Block) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this machine")
    exact = []
    for of_all in (exact_module._on_tensor_cores, exact_module._by_chunks):
        max_logit, log_mass, output, share, energy = of_all(block)
        exact.append((max_logit, log_mass, output, share, energy.sqrt()))
    for actual, expected in zip(*exact, strict=True):
        # On a GPU, the weights in outputs have ten bits.
        tolerance = 2e-3 if ON_GPU else 1e-4
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("seq_len", "num_queries"), [*SIZES, (64, 64), (130, 65)])
def test_a_gpus_kernels_compute_the_same(make_block, seq_len, num_queries, dtype):
    assert_tensor_cores_compute_the_same(on_device(make_block(3, seq_len, num_queries, dtype=dtype)))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_a_gpus_kernels_take_any_head_dim(make_block, head_dim):
    assert_tensor_cores_compute_the_same(on_device(make_block(2, 70, 90, head_dim, torch.bfloat16)))


def test_a_gpus_kernels_know_biases_padding_and_shares(make_block):
    block = make_block(3, 100, 70, dtype=torch.bfloat16)
    bias = torch.rand(3, 100)
    bias[1, 60:] = -torch.inf
    bias[2] = -torch.inf
    log_mass = torch.logsumexp(block.query.float() @ block.key.float().mT * block.scaling, 2) + torch.rand(3, 70)
    assert_tensor_cores_compute_the_same(on_device(block, key_bias=bias, log_mass=log_mass))


def test_float32_and_cpus_go_chunk_by_chunk(make_block):
    assert not exact_module.can_use_tensor_cores(make_block(dtype=torch.bfloat16))
    assert not exact_module.can_use_tensor_cores(on_device(make_block()))


@pytest.mark.gpu
def test_a_gpu_uses_its_kernels(make_block, monkeypatch):
    block = on_device(make_block(dtype=torch.bfloat16))
    assert exact_module.can_use_tensor_cores(block)
    expected = exact_attention(block)
    monkeypatch.setattr(exact_module, "_by_chunks", None)
    for field in FIELDS:
        torch.testing.assert_close(getattr(exact_attention(block), field), getattr(expected, field))
