"""Decides by a GGUF file's metadata whether the model's cache can be compacted."""

from __future__ import annotations

import ctypes
from typing import Any

from am_memory.engines.llama_cpp.library import library
from am_memory.errors import UnsupportedModel

CHUNKED = {"llama4"}
"""Architectures whose layers with a window attend within fixed chunks."""


def require_supported(model: Any) -> None:
    """Raise UnsupportedModel for a model whose cache is not the keys and values of causal attention."""
    reason = _reason_against(model)
    if reason is not None:
        raise UnsupportedModel(
            f"{meta(model, 'general.name') or 'this model'} ({meta(model, 'general.architecture')}) {reason}; use a "
            "decoder-only model with standard attention (Llama, Mistral, Qwen2, Qwen3, SmolLM, Phi-3, Granite, OLMo...)"
        )


def _reason_against(model: Any) -> str | None:
    lib, architecture = library(), meta(model, "general.architecture")

    def says(key: str) -> str | None:
        value = meta(model, f"{architecture}.{key}")
        return None if value in (None, "0", "0.000000", "false", "none") else value

    if lib.llama_model_has_encoder(model):
        return "is an encoder-decoder model"
    if lib.llama_model_is_hybrid(model):
        return "is a hybrid: some of its layers are recurrent, and have a state instead of keys and values"
    if lib.llama_model_is_recurrent(model):
        return "is recurrent: it has a state instead of keys and values"
    if lib.llama_model_is_diffusion(model) or meta(model, f"{architecture}.attention.causal") == "false":
        return "does not attend causally"
    if says("attention.kv_lora_rank"):
        return "caches a latent vector (MLA), not keys and values"
    rope = lib.llama_model_rope_type(model)
    if rope in (lib.LLAMA_ROPE_TYPE_MROPE, lib.LLAMA_ROPE_TYPE_IMROPE, lib.LLAMA_ROPE_TYPE_VISION):
        return "uses M-RoPE: its positions have several axes"
    if cap := says("attn_logit_softcapping"):
        return f"caps its attention scores (attn_logit_softcapping={cap})"
    if says("attention.max_alibi_bias"):
        return "adds a bias by distance to its attention scores (ALiBi)"
    if says("rope.scaling.type") == "longrope":
        return "rotates keys by the size of llama.cpp's context (longrope), and the context grows here"
    return None


def require_plain_windows(model: Any) -> None:
    """Raise UnsupportedModel for a model whose windows do not slide with the token: llama.cpp alone has their mask."""
    if (architecture := meta(model, "general.architecture")) in CHUNKED:
        raise UnsupportedModel(
            f"{meta(model, 'general.name') or 'this model'} ({architecture}) attends within fixed chunks of the text, "
            "which ragged heads do not: use heads='shared'"
        )


def meta(model: Any, key: str) -> str | None:
    """A value of the GGUF file's metadata as text; None if there is none."""
    lib = library()
    size = lib.llama_model_meta_val_str(model, key.encode(), None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    lib.llama_model_meta_val_str(model, key.encode(), buffer, size + 1)
    return buffer.value.decode("utf-8", "replace")
