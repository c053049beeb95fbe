"""Attention whose scores are capped: a score s becomes cap * tanh(s / cap), before biases and masks are added.

No kernel of torch caps scores, so these are plain operations, a block of queries at a time. Knows no cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.kv_cache.slots import Slots

MAX_SCORES = 2**24
"""The most attention scores that are held at once."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Causal attention over compact slots and an exact tail; see `attention.attend`.

    Args:
        slots: none of them in int8.
        softcap: no score is farther from 0 than this; above 0.
    """
    num_heads, num_tokens = key.shape[1], query.shape[2]
    parts: list[tuple[Tensor, Tensor]] = []
    for head, queries in enumerate(query[0].reshape(num_heads, -1, *query.shape[2:])):
        keys, values, bias = key[0, head], value[0, head], key.new_zeros(key.shape[2])
        if slots is not None:
            held = slots.heads[head]
            keys, values = torch.cat([held.key[0, 0], keys]), torch.cat([held.value[0, 0], values])
            bias = torch.cat([held.bias[0, 0, 0], bias])
        is_hidden = torch.ones(num_tokens, len(keys), dtype=torch.bool, device=key.device)
        is_hidden = is_hidden.triu(len(keys) - num_tokens + 1)
        mask = bias.float().expand(num_tokens, -1).masked_fill(is_hidden, -torch.inf)
        parts.append(_attention(queries, keys, values, mask, scaling, softcap))
    outputs, masses = (torch.cat(each)[None] for each in zip(*parts, strict=True))
    return outputs, masses


def attend_with_mask(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention over a plain cache.

    Args:
        query: (batch, num_attention_heads, num_tokens, head_dim).
        key, value: (batch, num_key_value_heads, num_keys, head_dim), the new tokens last.
        mask: (batch, 1, num_tokens, num_keys), of bool or added to the scores; None: causal.
        softcap: no score is farther from 0 than this; above 0.

    Returns:
        output, in the shape of the query; and the log of each query's attention mass, (the same without head_dim)
        float32.
    """
    groups, num_tokens, num_keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if mask is None:
        mask = query.new_ones(num_tokens, num_keys, dtype=torch.bool).tril(num_keys - num_tokens)[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return _attention(query, key, value, mask, scaling, softcap)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Attention over one set of keys, whose leading axes broadcast with the query's."""
    block = max(MAX_SCORES // max(query.shape[:-2].numel() * key.shape[-2], 1), 1)
    outputs, masses = [], []
    for start in range(0, query.shape[-2], block):
        rows = slice(start, start + block)
        scores = query[..., rows, :].float() @ key.float().mT * (scaling / softcap)
        scores = scores.tanh_().mul_(softcap) + mask[..., rows, :]
        mass = scores.logsumexp(dim=-1)
        outputs.append((scores - mass[..., None]).exp_().to(value.dtype) @ value)
        masses.append(mass)
    return torch.cat(outputs, dim=-2), torch.cat(masses, dim=-1)
