"""A random Llama or Gemma 3 of transformers as a GGUF file, with the same weights and tokens, for llama.cpp's tests."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
GEMMA_NAMES = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **metadata: float | bool | str
) -> Path:
    """The model in float32, of a tokenizer that has a token for each byte.

    Args:
        metadata: further keys of the architecture, with __ for a dot.
    """
    config = model.config
    is_gemma = config.model_type == "gemma3_text"
    architecture = "gemma3" if is_gemma else "llama"
    writer = gguf.GGUFWriter(path, architecture)
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
        name = f"{architecture}.{key.replace('__', '.')}"
        adders = {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string, int: writer.add_uint32}
        adders[type(value)](name, value)
    _add_tokens(writer, tokenizer, config.vocab_size)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        writer.add_tensor(*(_gemma_tensor(name, weight) if is_gemma else _tensor(name, weight, config)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    vocab, special = tokenizer.get_vocab(), set(tokenizer.all_special_ids)
    texts = {index: text for text, index in vocab.items()}
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(texts))]
    kinds += [gguf.TokenType.UNUSED] * (vocab_size - len(texts))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"<unused{index}>") for index in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{texts[0]} {texts[0]}"])  # there must be one; it makes no token
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def _gemma_tensor(name: str, weight: np.ndarray) -> tuple[str, np.ndarray]:
    """Under llama.cpp's name; its norms multiply by the weight, where transformers' multiply by one more."""
    if name.endswith("norm.weight"):
        weight = weight + 1
    match name.split("."):
        case ["model", "embed_tokens", _]:
            return "token_embd.weight", weight
        case ["model", "norm", _]:
            return "output_norm.weight", weight
    _, _, layer, *module, _ = name.split(".")
    return f"blk.{layer}.{(NAMES | GEMMA_NAMES)['.'.join(module)]}.weight", weight


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
