"""Converting GGUF files: a tiny file written here, and the file of the bundled model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as transformers_logging

from am_memory.engines.model_files import demo_model_path
from am_memory.engines.transformers import gguf_conversion
from am_memory.engines.transformers.loading import load_model, needs_conversion
from am_memory.errors import ModelNotFound, UnsupportedModel

HIDDEN, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["Hello, world", "naïve Ünïcödé 漢字 🙂", "  12 apples,\n\n\t34 pears", "<|im_start|>user\nhi<|im_end|>", ""]


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path: Path, *, rope_scaling: str | None = None, rope_factor: float | None = None) -> Path:
    """A random Llama with a byte-level vocabulary, its projections in Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope_scaling))
    _add_vocabulary(writer)
    _add_weights(writer)
    if rope_factor is not None:
        writer.add_tensor("rope_freqs.weight", np.full(HIDDEN // HEADS // 2, rope_factor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary() -> list[str]:
    return [*MARKS, *bytes_to_unicode().values(), "ĠĠ", "el"]


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = _vocabulary()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(tokens) - len(MARKS)))
    writer.add_token_merges(["Ġ Ġ", "e l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")


def _add_weights(writer: gguf.GGUFWriter) -> None:
    random = np.random.default_rng(0)
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv_size, HIDDEN),
        "attn_v": (kv_size, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (2 * HIDDEN, HIDDEN),
        "ffn_up": (2 * HIDDEN, HIDDEN),
        "ffn_down": (HIDDEN, 2 * HIDDEN),
    }
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", random.normal(size=(len(_vocabulary()), HIDDEN)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(HIDDEN, dtype=np.float32))
        for name, shape in shapes.items():
            weight = gguf.quantize(random.normal(scale=0.1, size=shape).astype(np.float32), q8_0)
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight, raw_dtype=q8_0)


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    ids = tokenizer("Compaction keeps what attention needs.", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def test_a_converted_gguf_equals_a_direct_load(tiny_gguf: Path, cache_home: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    first, tokenizer = load_model(tiny_gguf, device="cpu")
    again, _ = load_model(tiny_gguf, device="cpu")
    expected = logits(direct, tokenizer)
    assert torch.equal(logits(first, tokenizer), expected)
    assert torch.equal(logits(again, tokenizer), expected)
    assert again.config.get_text_config().tie_word_embeddings
    assert not hasattr(again.config, "quantization_config")


def test_a_gguf_is_converted_once(tiny_gguf: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs_conversion(tiny_gguf)
    load_model(tiny_gguf, device="cpu")
    assert not needs_conversion(tiny_gguf)
    monkeypatch.setattr(gguf_conversion, "read_gguf", None)
    load_model(tiny_gguf, device="cpu")


def test_the_tokenizer_survives_the_conversion(tiny_gguf: Path, cache_home: Path) -> None:
    _, direct = gguf_conversion.read_gguf(tiny_gguf, torch.float32)
    _, tokenizer = load_model(tiny_gguf, device="cpu")
    for text in TEXTS:
        assert tokenizer.encode(text) == direct.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == direct.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (MARKS[1], MARKS[2], MARKS[2])


def test_digits_stay_apart_from_the_space_before_them(tiny_gguf: Path, cache_home: Path) -> None:
    """SmolLM splits digits off before all else; transformers reads its GGUF as GPT-2, and took '  1' for ' ', ' 1'."""
    _, tokenizer = load_model(tiny_gguf, device="cpu")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("  12")) == ["ĠĠ", "1", "2"]


def test_a_float32_conversion_serves_every_dtype(tiny_gguf: Path, cache_home: Path) -> None:
    load_model(tiny_gguf, device="cpu")
    assert not needs_conversion(tiny_gguf, torch.bfloat16)
    assert load_model(tiny_gguf, device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert len(list((cache_home / "models").iterdir())) == 1


def test_a_conversion_to_bfloat16_does_not_serve_float32(tiny_gguf: Path, cache_home: Path) -> None:
    load_model(tiny_gguf, device="cpu", dtype=torch.bfloat16)
    assert not needs_conversion(tiny_gguf, torch.bfloat16)
    assert needs_conversion(tiny_gguf, torch.float32)


def test_another_file_of_the_same_name_is_converted_anew(tiny_gguf: Path, cache_home: Path) -> None:
    load_model(tiny_gguf, device="cpu")
    content = bytearray(tiny_gguf.read_bytes())
    content[-5] ^= 1
    tiny_gguf.write_bytes(content)
    assert needs_conversion(tiny_gguf)


def test_a_cache_that_cannot_be_written_costs_only_time(tiny_gguf: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "file"))
    model, tokenizer = load_model(tiny_gguf, device="cpu")
    assert logits(model, tokenizer).isfinite().all()
    assert "converted each time" in caplog.text


def test_an_interrupted_conversion_leaves_nothing(tiny_gguf: Path, cache_home: Path, monkeypatch) -> None:
    def interrupt(self: PreTrainedModel, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_model(tiny_gguf, device="cpu")
    assert not list((cache_home / "models").iterdir())
    assert needs_conversion(tiny_gguf)


def test_two_conversions_at_once_leave_one_folder(tiny_gguf: Path, cache_home: Path) -> None:
    loaded, tokenizer = gguf_conversion.read_gguf(tiny_gguf, torch.float32)
    folder = cache_home / "models" / "tiny"
    gguf_conversion.store_conversion(folder, loaded, tokenizer)
    gguf_conversion.store_conversion(folder, loaded, tokenizer)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_damaged_conversion_is_named(tiny_gguf: Path, cache_home: Path) -> None:
    load_model(tiny_gguf, device="cpu")
    (folder,) = (cache_home / "models").iterdir()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=folder.name):
        load_model(tiny_gguf, device="cpu")


@pytest.mark.parametrize("kept", [0, 3, 12, 30, 1000, 5000, 0.3, 0.7, 0.99])
def test_a_truncated_gguf_is_refused(tiny_gguf: Path, cache_home: Path, kept: float) -> None:
    content = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(content[: int(kept if kept >= 1 or not kept else kept * len(content))])
    with pytest.raises(ModelNotFound, match="cannot be read as a GGUF model"):
        load_model(tiny_gguf, device="cpu")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, cache_home: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("these are notes, not weights\n" * 100)
    with pytest.raises(ModelNotFound, match="cannot be read as a GGUF model"):
        load_model(path, device="cpu")


@pytest.mark.parametrize("scaling", [{"rope_scaling": "yarn"}, {"rope_factor": 8.0}])
def test_a_gguf_with_scaled_rope_is_unsupported(tmp_path: Path, cache_home: Path, scaling: dict) -> None:
    """Transformers drops the scaling as it reads the file, and computes other positions without a word."""
    with pytest.raises(UnsupportedModel, match="scales its RoPE"):
        load_model(write_gguf(tmp_path / "scaled.gguf", **scaling), device="cpu")


def test_a_gguf_that_states_no_scaling_is_loaded(tmp_path: Path, cache_home: Path) -> None:
    load_model(write_gguf(tmp_path / "plain.gguf", rope_scaling="none", rope_factor=1.0), device="cpu")


def test_loading_is_silent_and_leaves_the_settings(tiny_gguf: Path, cache_home: Path, capfd) -> None:
    transformers_logging.enable_progress_bar()
    load_model(tiny_gguf, device="cpu")
    load_model(tiny_gguf, device="cpu")
    assert transformers_logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.model
def test_the_demo_model_equals_a_direct_load(demo) -> None:
    path = demo_model_path()
    direct = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model, tokenizer = demo
    assert torch.equal(logits(model, tokenizer), logits(direct, tokenizer))


@pytest.mark.model
def test_the_demo_model_ends_its_turns(demo) -> None:
    model, tokenizer = demo
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2


@pytest.mark.model
def test_the_demo_tokenizer_gives_every_text_back(demo) -> None:
    _, tokenizer = demo
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("\n  12")) == ["ĊĠĠ", "1", "2"]
