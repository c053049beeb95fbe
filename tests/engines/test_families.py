"""Which models work, to rounding, and which are refused, with the reason: tiny random configurations of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import transformers
from inside import cache_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.attention import ATTENTION_NAME
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import RecurrentState, SlidingState, TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.queries.total_mass import total_log_mass

NUM_TOKENS = 60
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MAMBA = {"shared_intermediate_size": 48, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
GEMMA4 = {
    "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
}  # fmt: skip
SHARED = {
    "num_hidden_layers": 7, "num_kv_shared_layers": 3, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 260, "layer_types": ["full_attention", "sliding_attention"] * 2 + MIXED[1:] + MIXED[1:2],
}  # fmt: skip
GEMMA3N = {"head_dim": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.5] * 7, "altup_num_inputs": 2}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


EXPERTS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "shared_expert_intermediate_size": 8, "layer_types": HYBRID, **MOE,
}  # fmt: skip
MAMBA2 = {
    "num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "expand": 2,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8,
    "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1, "moe_latent_size": None,
}  # fmt: skip
LATENTS = {
    "q_lora_rank": 8, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 2,
}  # fmt: skip
CHUNKS = {
    "attention_chunk_size": 16,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0, 1, 0],
    "num_hidden_layers": 4,
}


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers, without its `Config`, and what is special."""

    name: str
    special: dict[str, object] = field(default_factory=dict)
    compiles: bool = True
    tolerance: float = 1e-4

    def build(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(transformers, f"{self.name}Config")(**{**SIZES, **self.special})
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


FAMILIES = [
    Family("Llama"),
    Family("Mistral", {"sliding_window": None}),
    Family("Mistral", {"sliding_window": SIZES["max_position_embeddings"]}),
    Family("Ministral", {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    Family("Qwen2"),
    Family("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    Family("Qwen3", {"head_dim": 8}),
    Family("Qwen3Moe", {"head_dim": 8, **MOE}),
    Family("Mixtral", {"num_local_experts": 2}),
    Family("Phi3"),
    Family("Phi3", {"sliding_window": 1000}),
    Family("Granite", {"attention_multiplier": 0.2, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    Family("GraniteMoeHybrid", {"layer_types": ["full_attention"] * 3, "num_local_experts": 0, **MAMBA}),
    Family("Olmo", {"clip_qkv": 4.0}),
    Family("Olmo2"),
    Family("Olmo3", {"num_hidden_layers": 4, "sliding_window": 16}),
    Family("Gemma", {"head_dim": 8}),
    Family("Gemma3Text", {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED}),
    Family("Gemma4Text", {"layer_types": MIXED[:2] * 2, "sliding_window": 16, **GEMMA4}),
    Family("Gemma4Text", {"sliding_window": 16, **GEMMA4, **SHARED}, compiles=False),
    Family("Gemma3nText", {"sliding_window": 16, **GEMMA3N, **SHARED}, compiles=False),
    Family("SmolLM3", {"num_hidden_layers": 4}),
    Family("Starcoder2"),
    Family("Cohere"),
    Family("Cohere2", {"sliding_window": 16, "layer_types": MIXED}),
    Family("Glm4", {"head_dim": 8}),
    Family("Glm4Moe", {**MOE, "head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}),
    Family("GraniteMoe", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    Family("MiniMaxM2", {"head_dim": 8, "rotary_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}),
    Family("Ministral3", {"head_dim": 8, "sliding_window": None}),
    Family("Exaone4", {"sliding_window": 16, "layer_types": MIXED}),
    Family("SeedOss", {"head_dim": 8}),
    Family("Phi"),
    Family("GPTNeoX"),
    Family("Qwen3Next", LINEAR),
    Family("Qwen3_5Text", LINEAR),
    Family("OlmoHybrid", {**LINEAR, "num_hidden_layers": 4, "layer_types": HYBRID[:2] * 2}),
    Family("Qwen3_5MoeText", LINEAR),
    Family("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}),
    Family("GraniteMoeHybrid", {"layer_types": HYBRID, "num_local_experts": 0, **MAMBA}),
    Family("FalconH1", {**MAMBA, "mamba_d_ssm": 64}, compiles=False),
    Family(
        "NemotronH",
        {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"], **MAMBA2},
        tolerance=3e-3,  # transformers steps differ from its chunks by 1e-3
    ),
    Family("DeepseekV2", LATENTS, compiles=False),
    Family("DeepseekV3", LATENTS, compiles=False),
    Family("Glm4MoeLite", LATENTS, compiles=False),
    Family("MiniCPM3", LATENTS, compiles=False),
    Family("Youtu", LATENTS, compiles=False),
    Family("AXK1", LATENTS, compiles=False),
    Family("Gemma2", {"head_dim": 8, "sliding_window": 16, "layer_types": MIXED, "attn_logit_softcapping": 1.0}),
    Family("GptOss", {**EXPERTS, "sliding_window": 16, "layer_types": MIXED}),
    Family(
        "Llama4Text", {**EXPERTS, **CHUNKS, "layer_types": ["chunked_attention", "full_attention"] * 2}, compiles=False
    ),
]


def identity(family: Family) -> str:
    window = family.special.get("sliding_window") or 0
    kind = "" if not window else "-sliding" if window < SIZES["max_position_embeddings"] else "-wide"
    return family.name + kind


@pytest.fixture(scope="module", params=FAMILIES, ids=identity)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def expected(family: Family) -> Tensor:
    """What the stock model says at each token, from one pass without a cache."""
    with torch.no_grad():
        return family.build()(torch.tensor([tokens()]), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def engine(family: Family, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    return TransformersEngine(family.build(), byte_tokenizer)


def tensors(state: SlidingState | RecurrentState) -> tuple[Tensor | None, ...]:
    return (state.keys, state.values) if isinstance(state, SlidingState) else state.tensors


def tokens() -> list[int]:
    return torch.randint(256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


def masses_agree(engine: TransformersEngine) -> KVCache:
    """A cache of slots and exact tokens, for which the mass that a query has in a pass is the one computed afterwards."""
    cache, told = engine.new_cache(), list[tuple[Tensor, Tensor]]()
    engine.forward(cache, tokens()[:30])
    slots = [Slots.exact(*layer.exact_entries(2, 12), start=2) for layer in cache.compactable]
    cache.restore(cache.compacted([Segment(2, 12, 120)], slots, num_pinned=2))
    engine.forward(cache, tokens()[30:31], on_query=lambda index, *queries: told.append(queries))
    for layer, (query, log_mass) in zip(cache.compactable, told, strict=True):
        actual = total_log_mass(layer, cache.num_tokens, query.flatten(1, 2))
        torch.testing.assert_close(actual, log_mass.flatten(1, 2), rtol=0, atol=1e-5)
    return cache


def assert_same_logits(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compared with how far logits lie apart, as families scale them differently."""
    assert (actual - expected).abs().max() <= tolerance * expected.std()


def test_uncompacted_logits_are_those_of_the_stock_model(
    engine: TransformersEngine, expected: Tensor, family: Family
) -> None:
    """A prompt in chunks, then token by token, then a chunk again."""
    cache, ids = engine.new_cache(), tokens()
    bounds = [0, 20, 37, *range(38, 45), NUM_TOKENS]
    rows = [
        engine.forward(cache, ids[start:end], num_logits=end - start)
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]
    assert_same_logits(torch.cat(rows), expected, family.tolerance)


def test_compiled_layers_give_the_same_logits(
    family: Family, expected: Tensor, byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run as they are, which takes no compiler; that every layer was is required when they are made."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    if not family.compiles:
        with pytest.raises(UnsupportedModel, match="load it with compile=False"):
            TransformersEngine(family.build(), byte_tokenizer, compile=True)
        return
    engine = TransformersEngine(family.build(), byte_tokenizer, compile=True)
    cache = engine.new_cache()
    rows = [engine.forward(cache, [token], num_logits=1) for token in tokens()]
    assert_same_logits(torch.cat(rows), expected, family.tolerance)


def test_branches_expect_what_the_stock_model_does(engine: TransformersEngine, expected: Tensor) -> None:
    """The same text behind beginnings of it that differ in length, a token of each at once."""
    cache, ids = engine.new_cache(), tokens()
    engine.forward(cache, ids[:20])
    branches = engine.branches(cache, [ids[20:30], ids[20:23]])
    if branches is None:
        assert not cache.is_all_compactable or any(kind.has_latents for kind in cache.kinds)
        return
    for first, second in [(30, 23), (31, 24), (32, 25)]:
        assert_same_logits(branches.logits, expected[[first - 1, second - 1]], 1e-4)
        branches.advance([0, 1], [ids[first], ids[second]])


def test_keeping_everything_changes_nothing(engine: TransformersEngine, expected: Tensor) -> None:
    policy = MemoryPolicy(trigger_tokens=1.0, keep_ratio=1.0, max_compact_tokens=100, pinned=2)
    session = Memory(engine, policy).session()
    ids = tokens()
    session.append(ids[:30])
    session.compact(0.6)
    session.append(ids[30:45])
    report = session.compact(1.0)
    assert report.num_slots == report.end - report.start
    assert session.stats.num_segments == 2
    assert_same_logits(session.logits(ids[45:]), expected[44:-1], 2e-3)


def test_a_compaction_shrinks_the_full_layers_and_leaves_the_others(engine: TransformersEngine) -> None:
    policy = MemoryPolicy(trigger_tokens=1.0, keep_ratio=0.25, pinned=2)
    session = Memory(engine, policy).session()
    session.append(tokens())
    cache: KVCache = cache_of(session)
    others = [state for state in cache.state().layers if not isinstance(state, TailState)]
    num_bytes = session.stats.kv_bytes
    session.compact(1.0)
    left = [state for state in cache.state().layers if not isinstance(state, TailState)]
    assert all(
        one is other for pair in zip(left, others, strict=True) for one, other in zip(*map(tensors, pair), strict=True)
    )
    assert session.stats.kv_tokens == pytest.approx(2 + 0.25 * (NUM_TOKENS - 3), abs=0.5)
    assert session.stats.kv_bytes < num_bytes
    assert session.logits(tokens()).isfinite().all()


def test_the_window_says_how_many_tokens_a_sliding_layer_holds(engine: TransformersEngine, family: Family) -> None:
    cache = engine.new_cache()
    for start in range(0, NUM_TOKENS, 20):
        engine.forward(cache, tokens()[start : start + 20])
    held = {layer.keys.shape[2] for layer in cache.layers if layer.is_sliding}
    assert held <= {15}
    assert cache.compactable


# Refused


def t5() -> PreTrainedModel:
    config = transformers.T5Config(vocab_size=260, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Family("Mamba").build, "is recurrent"),
        (Family("DeepseekV32", LATENTS).build, "layers of kind indexed_attention"),
        (t5, "encoder-decoder"),
        (
            Family("Mistral", {"sliding_window": 16}).build,
            "only layers that see a window or a chunk of its 512 positions",
        ),
        (Family("Bamba", {"attn_layer_indices": [1], **MAMBA}).build, "disagrees with itself"),
        (Family("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}).build, "itself"),
        (Family("MiniMax", {**EXPERTS, "layer_types": HYBRID}).build, "uses cache of its own"),
        (Family("Falcon").build, "does not take another attention function"),
        (Family("Falcon", {"alibi": True}).build, "a bias for each token's distance .* .ALiBi."),
        (Family("Bloom").build, "a bias for each token's distance .* .ALiBi."),
        (Family("Mpt").build, "a bias for each token's distance .* .ALiBi."),
        (Family("Doge").build, "a mask that is not causal"),
        (Family("DiffLlama").build, "its attention is not the standard one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "model",
)
def test_what_cannot_work_is_refused_with_the_reason(build, reason: str, byte_tokenizer) -> None:
    """DiffLlama passed as long as the probe only read: its values are rearranged behind the cache, so slots of them
    are not what its attention takes. Doge was refused by the attention function, with the wrong error."""
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=rf"{type(model).__name__}\b.*{reason}.*[;:] use a"):
        TransformersEngine(model, byte_tokenizer)
    assert model.config._attn_implementation == before != ATTENTION_NAME


@pytest.mark.parametrize("error", [IndexError("row 7"), AssertionError(), ZeroDivisionError("by zero")], ids=repr)
def test_any_error_in_the_trial_is_one_of_ours(error: Exception, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """An IndexError came out bare, with nothing about the model."""
    model = Family("Olmo3", {"num_hidden_layers": 4, "sliding_window": 16}).build()

    def fail(*args: object) -> None:
        raise error

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    expected = f"Olmo3ForCausalLM, with layers of full_attention and sliding_attention, .*{error or 'AssertionError'}"
    with pytest.raises(UnsupportedModel, match=expected):
        TransformersEngine(model, byte_tokenizer)


# A model stays what it was


def test_a_model_behind_the_engine_is_itself_for_other_caches(family: Family, expected: Tensor, engine) -> None:
    cache = transformers.DynamicCache(config=engine.model.config)
    with torch.no_grad():
        first = engine.model(torch.tensor([tokens()[:30]]), cache=cache).logits[0]
        rest = engine.model(torch.tensor([tokens()[30:]]), cache=cache).logits[0]
    assert_same_logits(torch.cat([first, rest]), expected, 1e-4)


def test_two_engines_may_share_a_model(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = FAMILIES[0].build()
    one, other = TransformersEngine(model, byte_tokenizer), TransformersEngine(model, byte_tokenizer)
    logits = [each.forward(each.new_cache(), tokens(), num_logits=1) for each in (one, other)]
    assert torch.equal(*logits)


def test_an_interrupted_probe_leaves_the_model_as_it_was(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    model = FAMILIES[0].build()

    def interrupt(*args: object) -> None:
        if model.config._attn_implementation == ATTENTION_NAME:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        TransformersEngine(model, byte_tokenizer)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
