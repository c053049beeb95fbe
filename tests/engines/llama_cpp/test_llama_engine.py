"""A GGUF model in llama.cpp behind the engine: the same logits, queries and texts as elsewhere, whatever the settings."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp.cache import CellCache
from am_memory.engines.llama_cpp.engine import Heads
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import EngineFailed, InvalidInput, ModelNotFound, UnsupportedModel

TOKENS = [ord(character) for character in "An owl is a bird that hunts at night, and sleeps by day."]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you? <|im_end|>"}]


def logits_of(engine: LlamaCppEngine, token_ids: list[int] = TOKENS) -> Tensor:
    return engine.forward(engine.new_cache(), token_ids, num_logits=len(token_ids))


def test_logits_are_those_of_transformers(llama: LlamaCppEngine, stock_model: PreTrainedModel) -> None:
    torch.testing.assert_close(logits_of(llama), stock_model(torch.tensor([TOKENS])).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kv_type", "settings"),
    [
        ("f16", {}),
        ("bf16", {}),
        ("f32", {"heads": "shared", "flash_attention": True}),
        ("f16", {"heads": "shared", "flash_attention": False}),
        ("f16", {"heads": "shared", "flash_attention": True}),
        ("bf16", {"heads": "shared", "flash_attention": False}),
        ("bf16", {"heads": "shared", "flash_attention": True}),
    ],
)
def test_logits_are_those_of_transformers_to_rounding(
    tiny_gguf: Path, stock_model: PreTrainedModel, kv_type: str, settings: dict[str, object]
) -> None:
    engine = LlamaCppEngine(tiny_gguf, kv_type=kv_type, **settings)
    expected = stock_model(torch.tensor([TOKENS])).logits[0]
    assert (logits_of(engine) - expected).square().mean().sqrt() < 1e-2 * expected.std()


def test_steps_do_not_matter(llama: LlamaCppEngine) -> None:
    cache = llama.new_cache()
    parts = [llama.forward(cache, part, num_logits=len(part)) for part in (TOKENS[:5], TOKENS[5:6], TOKENS[6:])]
    torch.testing.assert_close(torch.cat(parts), logits_of(llama), atol=1e-4, rtol=1e-4)


def test_only_the_last_logits_are_given(llama: LlamaCppEngine) -> None:
    torch.testing.assert_close(llama.forward(llama.new_cache(), TOKENS, num_logits=3), logits_of(llama)[-3:])
    assert llama.forward(llama.new_cache(), TOKENS).shape == (0, 260)


def test_more_than_a_batch_is_read_in_one_call(llama: LlamaCppEngine) -> None:
    """Logits and queries come as if llama.cpp took any number of tokens at once."""
    token_ids, heard = TOKENS * 12, []  # 672 tokens
    cache = llama.new_cache()
    logits = llama.forward(cache, token_ids, num_logits=200, on_query=lambda *queries: heard.append(queries))
    assert (logits.shape[0], cache.num_tokens) == (200, len(token_ids))
    assert [(index, query.shape[2], log_mass.shape[2]) for index, query, log_mass in heard] == [
        (i, 672, 672) for i in range(3)
    ]
    torch.testing.assert_close(logits, logits_of(llama, token_ids)[-200:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-4),
        ({"heads": "shared", "flash_attention": False}, 1e-4),
        ({"heads": "shared", "flash_attention": True}, 2e-2),
    ],
)
def test_queries_and_mass_are_those_of_transformers(
    engine: TransformersEngine, tiny_gguf: Path, settings: dict[str, object], tolerance: float
) -> None:
    """llama.cpp rotates other pairs of numbers, so that queries can be compared by their scores alone."""
    ours = LlamaCppEngine(tiny_gguf, kv_type="f32", **settings)
    scores: list[list[Tensor]] = [[], []]
    masses: list[list[Tensor]] = [[], []]
    for number, each in enumerate((engine, ours)):
        cache = each.new_cache()
        each.forward(cache, TOKENS[:20])
        queries: list[Tensor] = []

        def take(
            index: int, query: Tensor, log_mass: Tensor, queries: list[Tensor] = queries, to: int = number
        ) -> None:
            queries.append(query.clone())
            masses[to].append(log_mass.clone())

        each.forward(cache, TOKENS[20:], on_query=take)
        for layer, query in zip(cache.compactable, queries, strict=True):
            key, _ = layer.exact_entries(0, len(TOKENS))
            scores[number].append(query @ key.float().mT[:, None] * layer.scaling)
    torch.testing.assert_close(scores[1], scores[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(masses[1], masses[0], atol=tolerance, rtol=tolerance)


def test_what_a_listener_raises_comes_out_and_the_cache_goes_on(llama: LlamaCppEngine) -> None:
    """It is raised inside of llama.cpp, which would print and forget it; the cells after the last token are junk then."""
    cache = llama.new_cache()
    llama.forward(cache, TOKENS[:20])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llama.forward(cache, TOKENS[20:], on_query=stop)
    assert cache.num_tokens == 20
    rest = llama.forward(cache, TOKENS[20:], num_logits=len(TOKENS) - 20)
    torch.testing.assert_close(rest, logits_of(llama)[20:], atol=1e-4, rtol=1e-4)


def test_tokens_and_texts_are_those_of_the_tokenizer(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    text = "<|im_start|>user\nGrüße, \u2603 and 12<|im_end|>\n"
    token_ids = engine.encode(text)
    assert llama.encode(text) == token_ids
    assert (llama.decode(token_ids), llama.decode(token_ids, skip_special=True)) == (
        engine.decode(token_ids),
        engine.decode(token_ids, skip_special=True),
    )


def test_half_a_character_is_marked(llama: LlamaCppEngine) -> None:
    assert llama.decode(llama.encode("a\u2603")[:-1]) == "a\ufffd"


def test_the_template_writes_what_transformers_writes(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    for options in ({}, {"add_generation_prompt": True}):
        assert llama.render(MESSAGES, **options) == engine.render(MESSAGES, **options)


def test_messages_that_the_template_does_not_take_are_named(
    llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.vocabulary, "chat_template", "{{ raise_exception('no user here') }}")
    with pytest.raises(InvalidInput, match="the chat template of tiny does not take messages of roles user"):
        llama.render([{"role": "user", "content": "Hello"}])


def test_the_model_is_described(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    info = llama.info
    assert (info.vocab_size, info.window_tokens, info.name) == (260, 4096, "tiny")
    assert engine.info.eos_token_ids <= info.eos_token_ids


def test_other_types_of_keys_have_other_fingerprints(llama: LlamaCppEngine, tiny_gguf: Path) -> None:
    again, other = (LlamaCppEngine(tiny_gguf, kv_type=kv_type) for kv_type in ("f32", "f16"))
    assert again.info.fingerprint == llama.info.fingerprint != other.info.fingerprint


def test_caches_of_ragged_and_shared_heads_are_not_exchanged(
    llama: LlamaCppEngine, shared_llama: LlamaCppEngine
) -> None:
    assert llama.info.fingerprint != shared_llama.info.fingerprint
    with pytest.raises(InvalidInput, match="RaggedCache is another engine's cache"):
        shared_llama.forward(llama.new_cache(), TOKENS)
    with pytest.raises(InvalidInput, match="CellCache is another engine's cache"):
        llama.forward(shared_llama.new_cache(), TOKENS)


def test_a_llama_of_the_user_is_taken_with_its_settings(tiny_gguf: Path, llama: LlamaCppEngine) -> None:
    users = library().Llama(str(tiny_gguf), n_ctx=64, verbose=False, type_k=0, type_v=0, flash_attn=False)
    engine = LlamaCppEngine(users)
    assert torch.equal(logits_of(engine), logits_of(llama))
    assert engine.info.fingerprint == llama.info.fingerprint
    users.eval(TOKENS)  # its own context is its own
    assert torch.equal(logits_of(engine), logits_of(llama))


@pytest.mark.parametrize("heads", ["ragged", "shared"])
def test_a_llama_that_the_user_closes_is_not_touched_again(tiny_gguf: Path, heads: Heads) -> None:
    """llama.cpp read memory that it had freed, and the process died."""
    users = library().Llama(str(tiny_gguf), n_ctx=64, verbose=False)
    engine = LlamaCppEngine(users, heads=heads)
    caches = [engine.new_cache(), engine.new_cache()]
    for cache in caches:
        engine.forward(cache, TOKENS)
        engine.forward(cache, [7])
    engine.forward_batch(caches, [8, 9], [None, None])
    branches = engine.branches(caches[0], [[1], [2]])
    users.close()
    calls: list[Callable[[], object]] = [
        lambda: engine.forward(caches[0], [8]),
        lambda: engine.forward(caches[1], TOKENS),
        lambda: engine.forward(engine.new_cache(), TOKENS),
        lambda: engine.encode("owl"),
        lambda: engine.decode([40]),
    ]
    if branches is not None:
        calls += [
            lambda: engine.forward_batch(caches, [8, 9], [None, None]),
            lambda: engine.branches(caches[0], [[1], [2]]),
            lambda: branches.advance([0, 1], [3, 4]),
        ]
    for call in calls:
        with pytest.raises(EngineFailed, match=r"tiny.gguf was closed.*keep it open"):
            call()
    with pytest.raises(InvalidInput, match=r"this Llama of .*tiny.gguf is closed"):
        LlamaCppEngine(users)


def test_a_llama_outlives_its_engine(tiny_gguf: Path) -> None:
    users = library().Llama(str(tiny_gguf), n_ctx=64, verbose=False)
    engine = weakref.ref(LlamaCppEngine(users))
    gc.collect()
    assert engine() is None
    users.eval(TOKENS)
    users.close()


def test_a_llama_that_does_not_generate_is_refused(tiny_gguf: Path) -> None:
    users = library().Llama(str(tiny_gguf), n_ctx=64, verbose=False, embedding=True)
    with pytest.raises(InvalidInput, match="made for embeddings"):
        LlamaCppEngine(users)


def test_what_is_no_model_is_refused(llama: LlamaCppEngine, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelNotFound, match=r"broken.gguf cannot be read by llama.cpp: .+"):
        LlamaCppEngine(broken)
    with pytest.raises(UnsupportedModel, match="is not a GGUF file"):
        LlamaCppEngine("some/model")
    with pytest.raises(ModelNotFound, match="no such file"):
        LlamaCppEngine(tmp_path / "none.gguf")
    with pytest.raises(InvalidInput, match="dict is not a model"):
        LlamaCppEngine({})


def test_an_unknown_type_of_keys_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(InvalidInput, match="kv_type 'q3' is unknown: use f32, f16, bf16, q8_0"):
        LlamaCppEngine(tiny_gguf, kv_type="q3")


def test_a_type_that_the_model_cannot_have_is_refused_by_llama_cpp(tiny_gguf: Path) -> None:
    with pytest.raises(EngineFailed, match="block size 32 does not divide"):
        LlamaCppEngine(tiny_gguf, kv_type="q8_0", heads="shared")


def test_what_ragged_heads_cannot_have_is_refused(tiny_gguf: Path) -> None:
    with pytest.raises(InvalidInput, match="does not keep keys and values in q8_0: use kv_type 'f16'"):
        LlamaCppEngine(tiny_gguf, kv_type="q8_0")
    with pytest.raises(InvalidInput, match="takes the place of llama.cpp's flash attention"):
        LlamaCppEngine(tiny_gguf, flash_attention=False)
    with pytest.raises(InvalidInput, match="heads 'folded' is none of ragged, shared"):
        LlamaCppEngine(tiny_gguf, heads="folded")


def test_another_engines_cache_is_refused(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="KVCache is another engine's cache"):
        llama.forward(engine.new_cache(), TOKENS)
    with pytest.raises(InvalidInput, match="RaggedCache is another engine's cache"):
        engine.forward(llama.new_cache(), TOKENS)


@pytest.mark.parametrize("head_dim", [32, 64, 192])
def test_quantised_keys_and_values_are_compacted(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase, head_dim: int
) -> None:
    """q8_0 asks for heads of 32 numbers or more; from 64 on llama.cpp multiplies queries and keys by a matrix of its own."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=head_dim, max_position_embeddings=512, initializer_range=0.15,
        tie_word_embeddings=False,
    )  # fmt: skip
    path = write_gguf(tmp_path / "wide.gguf", LlamaForCausalLM(config).eval(), byte_tokenizer)
    policy = MemoryPolicy(trigger_tokens=400, keep_ratio=1.0, pinned=4, max_compact_tokens=150)
    session = Memory(LlamaCppEngine(path, kv_type="q8_0", heads="shared"), policy).session()
    session.append(TOKENS * 3)
    before = session.logits(TOKENS)
    session.compact(0.5)
    difference = (session.logits(TOKENS) - before).square().mean().sqrt()
    assert session.stats.num_segments == 1
    assert difference < 0.05 * before.std()


def test_a_memory_is_made_by_the_name_of_the_engine(tiny_gguf: Path, llama: LlamaCppEngine) -> None:
    """`dtype` is that of keys and values."""
    memory = Memory.from_pretrained(
        tiny_gguf, engine="llama_cpp", device="cpu", dtype=torch.float16, policy=MemoryPolicy(trigger_tokens=120)
    )
    session = memory.session()
    session.append("An owl is a bird. " * 20)
    assert session.stats.num_compactions > 0
    assert session.stats.exact_kv_bytes == 359 * 3 * 2 * 2 * 16 * 2  # layers, keys and values, heads, head_dim, float16
    assert memory.engine.info.fingerprint != llama.info.fingerprint


def test_keys_of_another_dtype_are_refused(tiny_gguf: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"does not store keys and values in torch.float64: use one of torch.float32"
    ):
        Memory.from_pretrained(tiny_gguf, engine="llama_cpp", dtype=torch.float64)


def test_a_session_outlives_its_engine(tiny_gguf: Path, llama: LlamaCppEngine) -> None:
    """Its cells are of no use without the weights: whoever has a cache has the model."""
    engine = LlamaCppEngine(tiny_gguf, kv_type="f32", flash_attention=False, heads="shared")
    cache = engine.new_cache()
    engine.forward(cache, TOKENS[:20])
    del engine
    assert isinstance(cache, CellCache)
    logits = cache.read(TOKENS[20:], len(TOKENS) - 20, None)
    torch.testing.assert_close(logits, logits_of(llama)[20:], atol=1e-4, rtol=1e-4)


def test_engine_and_cache_say_what_they_are_in_one_line(llama: LlamaCppEngine) -> None:
    assert repr(llama) == "<LlamaCppEngine: tiny on cpu, context window of 4,096 tokens, keys and values in f32/f32>"
    assert repr(llama.new_cache()) == "<RaggedCache: 0 tokens in 0 slots, 0.0 MiB, 0 segments>"
