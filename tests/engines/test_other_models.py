"""Models that AutoModelForCausalLM does not load: those that read images as well, and those with code of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers.loading import load_model
from am_memory.errors import InvalidInput, UnsupportedModel, UnsupportedOperation

POLICY = MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
TEXT = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def llava() -> PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_id=259
    )
    return transformers.LlavaForConditionalGeneration(config)


def mistral3() -> PreTrainedModel:
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VISION),
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=259,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def internvl() -> PreTrainedModel:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [14, 14]}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision), text_config=Qwen2Config(**TEXT), image_token_id=259
    )
    return transformers.InternVLForConditionalGeneration(config)


def smolvlm() -> PreTrainedModel:
    config = transformers.SmolVLMConfig(
        vision_config=transformers.SmolVLMVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_id=259,
        scale_factor=2,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


@pytest.fixture(params=[llava, mistral3, internvl, smolvlm], ids=lambda build: build.__name__)
def folder(request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    request.param().eval().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_the_text_part_of_a_model_that_reads_images_is_used(folder: Path) -> None:
    """`from_pretrained` refused what the engine runs."""
    memory = Memory.from_pretrained(folder, policy=POLICY, device="cpu")
    tokens = list(b"The owl sat on the old oak.")
    with torch.no_grad():
        expected = load_model(folder, device="cpu")[0](torch.tensor([tokens])).logits[0]
    session = memory.session()
    session.append(tokens[:1])
    torch.testing.assert_close(session.logits(tokens[1:]), expected[:-1], rtol=0, atol=1e-3)
    session.append(tokens * 6)
    assert session.stats.num_compactions > 1
    cache = memory.cache()
    memory.engine.model.generate(torch.tensor([tokens]), cache=cache, max_new_tokens=60, do_sample=False)
    assert cache.kv_tokens <= 64


def test_images_are_refused_by_name(folder: Path) -> None:
    memory = Memory.from_pretrained(folder, policy=POLICY, device="cpu")
    with pytest.raises(UnsupportedOperation, match="holds text alone: leave out pixel_values"):
        memory.engine.model(torch.tensor([[1, 2]]), cache=memory.cache(), pixel_values=torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_a_message_with_other_parts_than_text_is_refused(engine, kind: str) -> None:
    session = Memory(engine, POLICY.model_copy(update={"trigger_tokens": 500})).session()
    content = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: "..."}]
    with pytest.raises(InvalidInput, match=f"a part of type '{kind}', but a memory holds only text"):
        session.append([{"role": "user", "content": content}])
    assert session.tokens == ()


# Code of their own

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwlConfig(LlamaConfig):
    model_type = "owl"

class OwlForCausalLM(LlamaForCausalLM):
    config_class = OwlConfig
"""


@pytest.fixture
def owl(
    new_tiny_model: Callable[[], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    for module in ("dynamic_module_utils", "utils.hub", "utils"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    folder = tmp_path / "owl"
    new_tiny_model().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "owl",
        "auto_map": {"AutoConfig": "owl.OwlConfig", "AutoModelForCausalLM": "owl.OwlForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "owl.py").write_text(CODE)
    return folder


def test_code_of_a_model_runs_where_it_is_trusted_and_nowhere_else(owl: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"code of its own.*trust_remote_code=True \(--trust-remote-code\)"):
        Memory.from_pretrained(owl, policy=POLICY, device="cpu")
    memory = Memory.from_pretrained(owl, policy=POLICY, device="cpu", trust_remote_code=True)
    assert type(memory.engine.model).__name__ == "OwlForCausalLM"
    session = memory.session()
    session.append([byte % 256 for byte in range(300)])
    assert session.stats.num_compactions > 1


def test_what_cannot_be_loaded_says_how_else(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=260, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"Memory\(TransformersEngine\(model, tokenizer\)\)"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("asked", [{"window_tokens": 64}, {"trust_remote_code": True}], ids=str)
def test_what_is_for_transformers_alone_is_refused_of_llama_cpp(asked: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="work with engine='transformers' only"):
        Memory.from_pretrained("demo", engine="llama_cpp", **asked)


def test_the_window_reaches_the_engine(byte_tokenizer, new_tiny_model, tmp_path: Path) -> None:
    new_tiny_model().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    memory = Memory.from_pretrained(tmp_path, policy=POLICY, device="cpu", window_tokens=128)
    assert memory.engine.info.window_tokens == 128
