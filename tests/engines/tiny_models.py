"""Makes a tiny random model of any family of transformers, from the family's own configuration class."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

FAMILIES = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
"""All causal and image-text families of the installed transformers, as it names them."""
NUM_LAYERS = 4
MAX_PARAMETERS = 80_000_000
SIZES: dict[str, object] = {
    # of every model
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 260),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim"], 32),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff"], 48),
    **dict.fromkeys(["ffn_hidden_size", "d_ff", "intermediate_size_mlp", "shared_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], NUM_LAYERS),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "n_head_kv", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "global_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels", "d_kv"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"], 512),
    "sliding_window": 16,
    "rotary_dim": 8,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    # experts
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "n_shared_experts"], 1),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 16),
    # recurrent layers
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "mamba_d_head", "linear_num_key_heads", "linear_num_value_heads"], 4),
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_d_ssm": 64,
    "mamba_expand": 2, "expand": 2, "n_groups": 1, "mamba_n_groups": 1,
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim"], 8),
    "lru_width": 32, "linear_head_dim": 8, "linear_num_heads": 4,
    # latents
    "q_lora_rank": 8, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16,
    # per-layer embeddings
    "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2,
    # images
    "image_size": 32, "patch_size": 16, "depth": 1, "spatial_merge_size": 1, "out_hidden_size": 32,
    "projection_dim": 32, "num_image_tokens": 4, "mm_tokens_per_image": 4, "embed_dim": 32,
}  # fmt: skip
"""Sizes by the name of the field, in every part of a configuration."""


def tiny_config(config_class: type[PreTrainedConfig], options: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A configuration with small sizes; parts of it (of text, of images) are small as well.

    Args:
        options: fields that need other values; those of a part stand in a dictionary under its name.
    """
    given = dict(options or {})
    names = {field.name for field in fields(config_class)} if is_dataclass(config_class) else set(SIZES)
    own_names = set(names)
    names |= set(getattr(config_class, "attribute_map", {}))
    values = {name: value for name, value in SIZES.items() if name in names} | _for_its_defaults(
        config_class, own_names
    )
    values |= {
        short: values.pop(name) for name, short in getattr(config_class, "attribute_map", {}).items() if name in values
    }
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if name in names:
            values[name] = _tiny_part(config_class, name, part, given.pop(name, {}))
    return config_class(**{**values, **given})


def _tiny_part(
    config_class: type[PreTrainedConfig], name: str, part: type[Any], options: dict[str, Any]
) -> PreTrainedConfig | None:
    """A part of a configuration; its class may depend on what the family has by default."""
    if part is not AutoConfig:
        return tiny_config(part, options)
    kind = options.pop("model_type", None) or getattr(getattr(config_class(), name, None), "model_type", None)
    return None if kind is None else tiny_config(CONFIG_MAPPING[kind], options)


def _for_its_defaults(config_class: type[PreTrainedConfig], names: set[str]) -> dict[str, Any]:
    """Values that depend on what the family has by default."""
    try:
        default = config_class()
    except Exception:  # some cannot do without their parts
        return {}
    values: dict[str, Any] = {}
    if getattr(default, "sliding_window", None) is None and "sliding_window" in names:
        values["sliding_window"] = None
    if (kinds := getattr(default, "layer_types", None)) and "layer_types" in names:
        kinds = list(dict.fromkeys(kinds))
        values["layer_types"] = [kinds[index % len(kinds)] for index in range(NUM_LAYERS)]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope and "rope_parameters" in names:
        values["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    return values


def tiny_model(family: str, options: dict[str, Any] | None = None) -> PreTrainedModel:
    """A random model of a family, the same weights each time, as `Memory.from_pretrained` would load it."""
    config = tiny_config(CONFIG_MAPPING[family], options)
    auto = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.device("meta"):
        sizes = {name: one.numel() for name, one in auto.from_config(config).named_parameters()}
    if sum(sizes.values()) > MAX_PARAMETERS:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(f"{sum(sizes.values()):,} parameters, {sizes[largest]:,} of them in {largest}")
    torch.manual_seed(0)
    return auto.from_config(config).eval().requires_grad_(False)
