"""RoPE that changes with the length of the text: held at one length for our caches, and as ever for all others."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, InvalidPolicy, UnsupportedModel

POLICY = MemoryPolicy(trigger_tokens=60, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
TOKENS = torch.randint(256, (600,), generator=torch.Generator().manual_seed(1)).tolist()


def build(name: str = "Phi3", rope: dict[str, object] = LONG, **special: object) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "Phi3":
        special["original_max_position_embeddings"] = 64
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "rope_parameters": dict(rope), **special})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def read_in_pieces(engine: TransformersEngine, tokens: list[int]) -> Tensor:
    """One token, seventeen, one, seventeen..."""
    cache, rows = engine.new_cache(), []
    while len(rows) < len(tokens):
        size = 1 if len(rows) % 3 else 17
        piece = tokens[len(rows) : len(rows) + size]
        rows += engine.forward(cache, piece, num_logits=len(piece))
    return torch.stack(rows)


def assert_reads_as(engine: TransformersEngine, stock: PreTrainedModel, num_tokens: int) -> None:
    with torch.no_grad():
        expected = stock(torch.tensor([TOKENS[:num_tokens]]), use_cache=False).logits[0]
    error = (read_in_pieces(engine, TOKENS[:num_tokens]) - expected).abs().max()
    assert error <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["Phi3", "Llama"])
@pytest.mark.parametrize(("window", "lengths"), [(64, (17, 40, 64)), (256, (65, 100, 250))])
def test_within_the_window_that_was_asked_for_logits_are_those_of_all_read_at_once(
    name: str, window: int, lengths: tuple[int, ...], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Past the first window they were wrong by five times their spread: keys cached before it were turned otherwise."""
    engine = TransformersEngine(build(name), byte_tokenizer, window_tokens=window)
    for num_tokens in lengths:
        assert_reads_as(engine, build(name), num_tokens)


@pytest.mark.parametrize("num_tokens", [17, 100, 250])
def test_dynamic_rope_is_right_within_the_window(num_tokens: int, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build("Llama", DYNAMIC), byte_tokenizer)
    assert_reads_as(engine, build("Llama", DYNAMIC), num_tokens)


def test_nobody_chooses_between_two_sets_of_factors_unasked(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModel, match=r"more than 64 tokens .*window_tokens=64 for .*window_tokens=256 for"):
        TransformersEngine(build(), byte_tokenizer)


@pytest.mark.parametrize("window", [0, 257])
def test_a_window_that_the_model_does_not_have_is_refused(window: int, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidInput, match=f"window_tokens is {window}: .*256 positions"):
        TransformersEngine(build(), byte_tokenizer, window_tokens=window)


def test_the_window_bounds_the_trigger_and_the_reach(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build(), byte_tokenizer, window_tokens=64)
    with pytest.raises(InvalidPolicy, match="above the model's window of 64"):
        Memory(engine, POLICY.model_copy(update={"trigger_tokens": 65}))
    session = Memory(engine, POLICY).session()
    session.append(TOKENS)
    assert engine.capabilities.can_rotate_keys
    assert session.segments[0].shift > 400


@pytest.mark.parametrize("window", [64, 256])
@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_the_model_is_as_it_was_for_its_own_caches(
    window: int, rope: dict[str, object], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """On both sides of every change, and whatever was read into ours in between."""
    model, stock = build("Llama", rope), build("Llama", rope)
    engine = TransformersEngine(model, byte_tokenizer, window_tokens=window)
    for num_tokens in (40, 100, 400, 300, 20):
        ids = torch.tensor([TOKENS[:num_tokens]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, stock(ids).logits)
        engine.forward(engine.new_cache(), TOKENS[:30])
    assert torch.equal(copy.deepcopy(model)(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("window", [64, 256])
def test_generate_keeps_the_cache_where_phi_3_gives_its_own_up(
    window: int, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """It went on without, from its first token past the first window, and said nothing."""
    engine = TransformersEngine(build(), byte_tokenizer, window_tokens=window)
    cache = Memory(engine, POLICY).cache()
    output = engine.model.generate(torch.tensor([TOKENS[:30]]), cache=cache, max_new_tokens=120, **GREEDY)
    assert cache.num_tokens == output.shape[1] - 1
    assert cache.kv_tokens <= 60
    stock = build()
    expected = stock.generate(torch.tensor([TOKENS[:30]]), max_new_tokens=120, **GREEDY)
    assert torch.equal(engine.model.generate(torch.tensor([TOKENS[:30]]), max_new_tokens=120, **GREEDY), expected)


def test_a_generation_past_the_change_is_that_of_a_session(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build(), byte_tokenizer, window_tokens=256)
    memory = Memory(engine, POLICY)
    session = memory.session()
    session.append(TOKENS[:30])
    expected = [token for piece in session.generate(70) for token in piece.token_ids]
    output = engine.model.generate(torch.tensor([TOKENS[:30]]), cache=memory.cache(), max_new_tokens=70, **GREEDY)
    assert output[0, 30:].tolist()[: len(expected)] == expected


def test_caches_of_the_two_sets_are_not_exchanged(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = build()
    short, long = (TransformersEngine(model, byte_tokenizer, window_tokens=window) for window in (64, 256))
    assert short.info.fingerprint != long.info.fingerprint
    for engine, num_tokens in ((short, 50), (long, 90), (short, 50)):  # each by its own, on one model
        assert_reads_as(engine, build(), num_tokens)


def test_branches_are_held_as_well(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build(), byte_tokenizer, window_tokens=256)
    cache = engine.new_cache()
    engine.forward(cache, TOKENS[:20])
    branches = engine.branches(cache, [TOKENS[20:25]])
    branches.advance([0], [TOKENS[25]])
    torch.testing.assert_close(branches.logits, read_in_pieces(engine, TOKENS[:26])[-1:], rtol=0, atol=1e-3)


def test_a_compaction_may_be_made_beside_decoding(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(build("Llama", DYNAMIC), byte_tokenizer)
    assert engine.capabilities.can_read_in_parallel
    session = Memory(engine, POLICY.model_copy(update={"ahead_tokens": 8})).session()
    session.append(TOKENS[:300])
    assert session.segments


def test_what_cannot_be_held_is_refused_and_left_as_it_was(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """PhiMoE scales its keys by the length of the text beside turning them."""
    model = build("Phimoe", {**LONG, "short_mscale": 1.0, "long_mscale": 1.4}, num_local_experts=2)
    before = model.config._attn_implementation
    for window in (64, 256):
        with pytest.raises(UnsupportedModel, match="PhimoeForCausalLM rotates its keys by the length of the text"):
            TransformersEngine(model, byte_tokenizer, window_tokens=window)
    assert model.config._attn_implementation == before
