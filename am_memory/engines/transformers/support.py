"""Which transformers models can be compacted: by what their configuration says, then by trying.

A model works if its layers are causal softmax attention over keys that never change once written. What cannot work is
refused by name; what looks right is run for a few tokens beside transformers' own attention before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from am_memory.cache import KVCache
from am_memory.engines.transformers.attention import ATTENTION_NAME
from am_memory.errors import UnsupportedModel

PROBE_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest RMS error of the probe's logits, relative to their standard deviation."""


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Each layer's sliding window in tokens, None for full attention.

    Raises:
        UnsupportedModel: a model whose cache is not the keys and values of causal attention.
    """
    config = model.config.get_text_config(decoder=True)
    reason = _reason_against(model, config)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} {reason}; use a decoder-only model with standard attention (Llama, Mistral, Qwen2, "
            "Qwen3, SmolLM, Phi-3, Granite, OLMo...)"
        )
    layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
    return [
        kwargs["sliding_window"] if kind == "sliding_attention" else None
        for kind, kwargs in zip(layer_types, layer_kwargs, strict=True)
    ]


def _reason_against(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if getattr(model, "_is_stateful", False) or not hasattr(config, "num_attention_heads"):
        return "is recurrent: it has a state, not a cache of keys and values"
    if getattr(config, "kv_lora_rank", None):
        return "caches a latent vector (MLA), not keys and values"
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope or getattr(config, "mrope_section", None):
        return "uses M-RoPE: its positions have several axes"
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", 0):
        return "shares its cache between layers"
    if getattr(config, "attn_logit_softcapping", None):
        return f"caps its attention scores (attn_logit_softcapping={config.attn_logit_softcapping})"
    kinds = set(get_layer_types_and_kwargs(config)[0])
    if strange := kinds - {"full_attention", "sliding_attention"}:
        return f"has layers of kind {', '.join(sorted(strange))}"
    if "full_attention" not in kinds:
        return "has only sliding-window layers: its cache is bounded already"
    if not getattr(model, "_supports_attention_backend", False):
        return "does not take another attention function (_supports_attention_backend is false)"
    return None


@torch.no_grad()
def probe(model: PreTrainedModel, new_cache: Callable[[], KVCache]) -> None:
    """Read a few tokens with transformers' attention and with ours, in several steps, and compare.

    Raises:
        UnsupportedModel: the logits differ, or the model does not go through the attention interface.
    """
    ids = torch.arange(1, 1 + PROBE_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa")
        expected = model(ids, use_cache=False).logits[0].float()
        model.set_attn_implementation(ATTENTION_NAME)
        cache = new_cache()
        pieces = [model(ids[:, a:b], past_key_values=cache).logits[0] for a, b in ((0, 3), (3, 4), (4, PROBE_TOKENS))]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        model.set_attn_implementation(before)
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run with a compacting cache: {error}; use a decoder-only model with "
            "standard attention"
        ) from error
    actual = torch.cat(pieces).float()
    error = _relative_rms(actual, expected)
    is_used = all(layer.length == PROBE_TOKENS and layer.scaling is not None for layer in cache.compactable)
    if not is_used or not error <= TOLERANCE.get(model.dtype, 1e-3):
        model.set_attn_implementation(before)
        raise UnsupportedModel(
            f"{type(model).__name__} computes other logits with a compacting cache (relative error {error:.2g}); its "
            "attention is not the standard one: use another model"
        )


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.std().clamp_min(1e-12))
