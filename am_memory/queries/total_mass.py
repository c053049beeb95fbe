"""The attention mass of queries on all that a layer holds: slots, exact tokens and an attention sink together."""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.engines.base import SessionLayer
from am_memory.solver import Block, log_mass


def total_log_mass(layer: SessionLayer, num_tokens: int, query: Tensor) -> Tensor:
    """The log of the sum of exp(logit) over all keys of a layer and its sinks, (num_heads, num_queries) float32.

    Args:
        layer: a forward pass has told it its scaling.
        num_tokens: of the cache.
        query: (num_key_value_heads, num_key_value_groups * num_queries, head_dim), after RoPE, of tokens behind all
            that the layer holds; the queries of one query head stand together.
    """
    key, _ = layer.exact_entries(layer.start, num_tokens)
    bias = None
    if (slots := layer.slots) is not None:
        slot_key, _, slot_bias, _ = slots.padded()
        bias = torch.cat([slot_bias, key.new_zeros(key.shape[:2])], dim=1)
        key = torch.cat([slot_key, key], dim=1)
    assert layer.scaling is not None
    mass = log_mass(Block(query, key, key, layer.scaling, key_bias=bias, softcap=layer.softcap))
    if layer.sinks is None:
        return mass
    sinks = layer.sinks.float().view(len(key), -1, 1)
    return torch.logaddexp(mass.view(*sinks.shape[:2], -1), sinks).view(mass.shape)
