"""Multi-head latent attention (MLA): each token has one latent vector, and the keys and values of all heads are linear
maps of it.

The cache holds latents. The maps of the keys are applied to the queries instead, and those of the values to the
outputs. Attention is then that of one wide KV head, which the queries of all heads read. Knows no cache and no slots.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from am_memory.engines.transformers.in_place import InPlaceOf

EXPAND = "expand_kv"
"""The method of an attention module that makes the keys and values of all heads from latents."""


def has_latents(model: nn.Module) -> bool:
    """Whether a model caches latents. Older versions of transformers cache the keys and values of all heads."""
    return any(hasattr(module, EXPAND) for module in model.modules())


def keep_latents(model: PreTrainedModel) -> None:
    """Let attention have the latents of our caches as they are; with other caches the model is unchanged."""
    for module in model.modules():
        if hasattr(module, EXPAND):
            expand = getattr(module, EXPAND)
            setattr(module, EXPAND, InPlaceOf(expand, partial(_unless_ours, expand)))


def _unless_ours(expand: Any, latent: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    return (latent, rotary) if hasattr(latent, "am_layer") else expand(latent, rotary)


class LatentHeads:
    """The linear maps of one attention module.

    Args:
        module: an attention module whose `kv_b_proj` makes keys and values from latents.
    """

    def __init__(self, module: Any) -> None:
        projection, self._widths = module.kv_b_proj, [module.qk_nope_head_dim, module.qk_rope_head_dim]
        # Quantised weights and adapters cannot be read off: what they do to unit vectors is their matrix.
        weight = projection.weight if type(projection) is nn.Linear else _matrix(projection, module.kv_lora_rank)
        heads = weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, weight.shape[1])
        self._key_map = heads[:, : module.qk_nope_head_dim]  # (num_attention_heads, qk_nope_head_dim, kv_lora_rank)
        self._value_map = heads[:, module.qk_nope_head_dim :]  # (num_attention_heads, v_head_dim, kv_lora_rank)

    def queries(self, query: Tensor) -> Tensor:
        """Queries for latents, (batch, num_attention_heads, num_tokens, qk_rope_head_dim + kv_lora_rank).

        Args:
            query: (batch, num_attention_heads, num_tokens, qk_nope_head_dim + qk_rope_head_dim), the rotated part last.
        """
        plain, rotated = query.split_with_sizes(self._widths, dim=3)
        return torch.cat([rotated, plain @ self._key_map], dim=3)

    def outputs(self, output: Tensor) -> Tensor:
        """Each head's output, (batch, num_tokens, num_attention_heads, v_head_dim).

        Args:
            output: (batch, num_tokens, num_attention_heads, kv_lora_rank), of attention to latents.
        """
        return (output.transpose(1, 2) @ self._value_map.mT).transpose(1, 2).contiguous()


def _matrix(projection: nn.Module, width: int) -> Tensor:
    parameter = next(projection.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
    unit_vectors = torch.eye(width, device=parameter.device, dtype=dtype)
    return projection(unit_vectors).mT  # type: ignore[no-any-return]
