"""The attention mass of queries on all that a layer holds: slots, exact tokens and an attention sink together."""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.engines.base import SessionLayer
from am_memory.solver import Block, log_mass

MOST_SAMPLED = 1024
"""Of more keys than that, so many stand for all: a mass is only a weight in a fit."""
ALL_RECENT = 64
"""The newest keys get much attention, so that none of them is left out."""


def total_log_mass(layer: SessionLayer, num_tokens: int, query: Tensor, sampled_from: int | None = None) -> Tensor:
    """The log of the sum of exp(logit) over all keys of a layer and its sinks, (num_heads, num_queries) float32.

    Args:
        layer: a forward pass has told it its scaling.
        num_tokens: of the cache.
        query: (num_key_value_heads, num_key_value_groups * num_queries, head_dim), after RoPE, of tokens behind all
            that the layer holds; the queries of one query head stand together.
        sampled_from: of many exact tokens from here on, some stand for all. None: every key counts.
    """
    key, _ = layer.exact_entries(layer.start, num_tokens)
    bias = None
    if sampled_from is not None and num_tokens - ALL_RECENT - sampled_from > MOST_SAMPLED:
        key, bias = _sampled(key, query, slice(sampled_from - layer.start, num_tokens - ALL_RECENT - layer.start))
    if (slots := layer.slots) is not None:
        slot_key, _, slot_bias, _ = slots.padded()
        of_exact = key.new_zeros(key.shape[:2]) if bias is None else bias
        bias = torch.cat([slot_bias.to(of_exact.dtype), of_exact], dim=1)
        key = torch.cat([slot_key, key], dim=1)
    assert layer.scaling is not None
    mass = log_mass(Block(query, key, key, layer.scaling, key_bias=bias, softcap=layer.softcap))
    if layer.sinks is None:
        return mass
    sinks = layer.sinks.float().view(len(key), -1, 1)
    return torch.logaddexp(mass.view(*sinks.shape[:2], -1), sinks).view(mass.shape)


def _sampled(key: Tensor, query: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Keys with only some of a part of them, and biases with which these stand for the part.

    The half of them are those that the mean query looks at most, since few keys may have most of the mass; the others
    are evenly spaced, and stand for all that is left.
    """
    num_keys, half = part.stop - part.start, MOST_SAMPLED // 2
    middle = key[:, part]
    logits = torch.einsum("hd,hkd->hk", query.float().mean(dim=1), middle.float())
    largest = logits.topk(half).indices
    is_largest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, largest, True)
    spaced = torch.linspace(0, num_keys - 1, half, device=key.device).round().long().expand(len(key), -1)
    is_double = is_largest.gather(1, spaced)
    weight = ((num_keys - half) / (~is_double).sum(dim=1, keepdim=True).clamp_min(1)).log().expand(-1, half)
    bias = torch.cat([torch.zeros_like(weight), weight.masked_fill(is_double, -torch.inf)], dim=1)
    chosen = torch.cat([largest, spaced], dim=1)[:, :, None].expand(-1, -1, key.shape[2])
    before, behind = key[:, : part.start], key[:, part.stop :]
    none = bias.new_zeros(len(key), before.shape[1]), bias.new_zeros(len(key), behind.shape[1])
    return torch.cat([before, middle.gather(1, chosen), behind], dim=1), torch.cat([none[0], bias, none[1]], dim=1)
