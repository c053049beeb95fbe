"""The tiny random Llama of the other tests, with the same weights and tokens, as a GGUF file and behind llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from am_memory.engines.llama_cpp import LlamaCppEngine
from tests.conftest import CHATML, IM_END, IM_END_ID, IM_START, IM_START_ID, PAD, PAD_ID

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: PreTrainedModel, path: Path, *, arch: str = "llama", **metadata: float | bool) -> Path:
    """A random Llama in float32.

    Args:
        arch: what the file says it is.
        metadata: further keys of the architecture, with __ for a dot.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in metadata.items():
        name = f"{arch}.{key.replace('__', '.')}"
        add = writer.add_bool if isinstance(value, bool) else writer.add_float32 if isinstance(value, float) else None
        writer.add_uint32(name, int(value)) if add is None else add(name, value)  # type: ignore[arg-type]
    _add_tokens(writer, config.vocab_size)
    for name, parameter in model.named_parameters():
        writer.add_tensor(*_tensor(name, parameter.detach().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    bytes_of = bytes_to_unicode()
    marks = [IM_START, IM_END, PAD]
    texts = [*(bytes_of[byte] for byte in range(256)), *marks]
    texts += [f"<unused{index}>" for index in range(len(texts), vocab_size)]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3
    kinds += [gguf.TokenType.UNUSED] * (vocab_size - len(kinds))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{bytes_of[0]} {bytes_of[0]}"])  # there must be one; it makes no token
    writer.add_bos_token_id(IM_START_ID)
    writer.add_eos_token_id(IM_END_ID)
    writer.add_pad_token_id(PAD_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def _tensor(name: str, weight: np.ndarray, config: object) -> tuple[str, np.ndarray]:
    """Under llama.cpp's name; it rotates neighbours where transformers rotates halves, so their rows are interleaved."""
    match name.split("."):
        case ["model", "embed_tokens", _]:
            return "token_embd.weight", weight
        case ["model", "norm", _]:
            return "output_norm.weight", weight
        case ["lm_head", _]:
            return "output.weight", weight
    _, _, layer, *module, _ = name.split(".")
    ours = ".".join(module)
    if ours in ("self_attn.q_proj", "self_attn.k_proj"):
        halves = weight.reshape(-1, 2, config.head_dim // 2, weight.shape[1])  # type: ignore[attr-defined]
        weight = halves.swapaxes(1, 2).reshape(weight.shape)
    return f"blk.{layer}.{NAMES[ours]}.weight", np.ascontiguousarray(weight)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def llama(tiny_gguf: Path) -> LlamaCppEngine:
    """The tiny model behind llama.cpp, all in float32: flash attention would take keys and values as float16."""
    return LlamaCppEngine(tiny_gguf, kv_type="f32", flash_attention=False)
