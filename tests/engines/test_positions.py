"""Models that have a position for so many tokens and no more, and models that see what comes after a token."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import AMMemoryError, PromptTooLong, UnsupportedModel
from am_memory.session.appending import encode

WINDOW = 64
LARGE = MemoryPolicy(trigger_tokens=WINDOW, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TOKENS = torch.randint(3, 256, (200,), generator=torch.Generator().manual_seed(1)).tolist()
SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": WINDOW, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 16, "n_positions": WINDOW, "n_inner": 48, "rotary_dim": 4,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BOUNDED = {
    "GPT2": (GPT, WINDOW),
    "GPTBigCode": (GPT, WINDOW),
    "GPTJ": (GPT, WINDOW),  # a table of sines, as CodeGen's and CTRL's
    "CodeGen": (GPT, WINDOW),
    "CTRL": ({**GPT, "dff": 48}, WINDOW),
    "OPT": ({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, WINDOW),  # two rows more than positions
    "Bert": ({**SIZES, "is_decoder": True}, WINDOW),
    "Roberta": ({**SIZES, "is_decoder": True}, WINDOW - 1),  # its first row is that of padding
}


def build(name: str, sizes: dict[str, object], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=BOUNDED)
def bounded(request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerBase) -> tuple[TransformersEngine, int]:
    sizes, num_positions = BOUNDED[request.param]
    return TransformersEngine(build(request.param, sizes), byte_tokenizer), num_positions


def test_the_last_position_is_read_and_no_token_after_it(bounded: tuple[TransformersEngine, int]) -> None:
    """There was a bare IndexError within the model, which on a GPU ends the use that a process has of it."""
    engine, most = bounded
    assert engine.info.max_tokens == engine.info.window_tokens == most
    cache = engine.new_cache()
    engine.forward(cache, TOKENS[: most - 1])
    assert engine.forward(cache, [7], num_logits=1).isfinite().all()
    for tokens in ([7], [7] * 5):
        with pytest.raises(PromptTooLong, match=f"{most + len(tokens)} tokens are more than the {most} for which"):
            engine.forward(cache, tokens, num_logits=1)
    assert cache.num_tokens == most


def test_without_recall_its_room_is_not_asked_for(bounded: tuple[TransformersEngine, int]) -> None:
    """Sessions recall nothing there, but the memory refused a policy whose room for pages left too little."""
    policy = MemoryPolicy(trigger_tokens=40, keep_ratio=0.25, keep_recent=4, pinned=3, recall_tokens=32)
    Memory(bounded[0], policy).session()


def test_a_session_refuses_what_it_has_no_positions_for_before_it_reads(
    bounded: tuple[TransformersEngine, int],
) -> None:
    engine, most = bounded
    session = Memory(engine, LARGE.model_copy(update={"trigger_tokens": most}), sampling=Sampling()).session()
    for append in (session.append, lambda content: encode(session, content)):
        with pytest.raises(PromptTooLong, match="rewind, begin a new session, or use a model with RoPE"):
            append(TOKENS[: most + 1])
    assert session.tokens == ()
    assert session.stats.kv_tokens == 0
    session.append(TOKENS[: most - 9])
    assert session.logits(TOKENS[:10]).shape[0] == 10
    with pytest.raises(PromptTooLong):
        session.logits(TOKENS[:11])
    assert len(session.tokens) == most - 9


def test_an_answer_ends_where_the_positions_do(bounded: tuple[TransformersEngine, int]) -> None:
    engine, most = bounded
    session = Memory(engine, LARGE.model_copy(update={"trigger_tokens": most})).session()
    session.append(TOKENS[: most - 4])
    pieces = list(session.generate(50, Sampling(temperature=1.0, seed=3)))
    assert pieces[-1].finish_reason in ("length", "eos")
    while len(session.tokens) <= most:
        session.append([7])
    before = session.tokens
    with pytest.raises(PromptTooLong):
        next(session.generate(5))
    assert session.tokens == before
    session.rewind(most - 10)
    assert next(session.generate(1)).token_ids


def test_generate_refuses_an_answer_that_cannot_end_well(bounded: tuple[TransformersEngine, int]) -> None:
    engine, most = bounded
    memory = Memory(engine, LARGE.model_copy(update={"trigger_tokens": most}))
    cache, prompt = memory.cache(), torch.tensor([TOKENS[: most - 4]])
    with pytest.raises(PromptTooLong, match=rf"generate\(\) may come to {most + 6} tokens .*lower max_new_tokens by 5"):
        engine.model.generate(prompt, cache=cache, max_new_tokens=10, **GREEDY)
    assert cache.num_tokens == 0
    output = engine.model.generate(prompt, cache=cache, max_new_tokens=5, **GREEDY)
    assert output.shape[1] == most + 1
    with torch.no_grad(), pytest.raises(PromptTooLong):
        engine.model(output[:, -1:], cache=cache)


def test_a_compaction_without_room_behind_the_text_is_an_error_of_ours(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    sizes, _ = BOUNDED["GPT2"]
    session = Memory(
        TransformersEngine(build("GPT2", sizes), byte_tokenizer), LARGE.model_copy(update={"trigger_tokens": 60})
    ).session()
    session.append(TOKENS[:50])
    with pytest.raises(AMMemoryError, match=r"set trigger_tokens to 64, and none is ever due"):
        session.append(TOKENS[50:62])
    assert len(session.tokens) == 50


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "Phi", "Cohere", "Gemma3Text", "Qwen3Moe"])
def test_models_that_turn_their_keys_have_no_last_position(name: str, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """Experts are looked up by number as well."""
    special = {"Gemma3Text": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": ["full_attention"] * 2}}.get(
        name, {}
    )
    if name == "Qwen3Moe":
        special = {"head_dim": 8, "num_experts": 80, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    assert TransformersEngine(build(name, {**SIZES, **special}), byte_tokenizer).info.max_tokens is None


# Models that look ahead

ENCODERS = {"Bert": SIZES, "Roberta": SIZES, "Electra": {**SIZES, "embedding_size": 32}, "Ernie": SIZES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_refused_by_name(name: str, dtype: torch.dtype, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    """They passed: what was allowed grew with what transformers' own cache was off, which was not rounding."""
    model = build(name, ENCODERS[name], dtype)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=r"does not attend causally: .*is_decoder=True"):
        TransformersEngine(model, byte_tokenizer)
    assert model.config._attn_implementation == before
    decoder = build(name, {**ENCODERS[name], "is_decoder": True}, dtype)
    assert TransformersEngine(decoder, byte_tokenizer).info.max_tokens


def test_an_error_of_its_own_is_no_rounding(byte_tokenizer: PreTrainedTokenizerBase, monkeypatch) -> None:
    """A model that its own cache changes, causal or not."""
    model = build("Llama", SIZES)
    attention = model.model.layers[0].self_attn

    def noisy(module: object, args: tuple[object, ...], kwargs: dict) -> tuple[tuple[object, ...], dict]:
        if kwargs.get("cache") is not None and kwargs["cache"].get_seq_length():
            kwargs = {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.5 + 0.3}
        return args, kwargs

    hook = attention.register_forward_pre_hook(noisy, with_kwargs=True)
    with pytest.raises(UnsupportedModel, match="disagrees with itself"):
        TransformersEngine(model, byte_tokenizer)
    hook.remove()
