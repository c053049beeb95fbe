"""Attention over ragged, biased slots and an exact tail, part by part: for CPUs, and for GPUs without our kernels.

Attention over two sets of keys is the mean of the outputs of each set, weighted by its attention mass (the merge of
FlashAttention). Every part is computed in place, by the fastest kernel of the device, and the parts are merged by their
log-sum-exp. Nothing is padded, concatenated or masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from am_memory.kv_cache.slots import Slots

MAX_SCORES = 2**24
"""The most attention scores that the plain operations hold at once."""


def attend(query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal attention over compact slots and an exact tail.

    Args:
        query: (1, num_attention_heads, num_tokens, head_dim).
        key, value: (1, num_key_value_heads, tail_tokens, head_dim or value_dim), the new tokens last.
        slots: the entries before the tail, without int8 rows.
        scaling: softmax scale.

    Returns:
        output (1, num_attention_heads, num_tokens, value_dim), and the log of each query's attention mass on all keys,
        (1, num_attention_heads, num_tokens) float32.
    """
    num_heads, num_tokens, head_dim = key.shape[1], query.shape[2], query.shape[3]
    # The query heads of a group attend to the same keys: pool them, so that no key is repeated.
    packed = query.reshape(1, num_heads, -1, head_dim)
    parts, num_past = [], key.shape[2]
    if num_tokens > 1:
        num_past -= num_tokens
        parts.append(_causal_part(query, key[:, :, num_past:], value[:, :, num_past:], scaling))
    parts += past_parts(packed, key[:, :, :num_past], value[:, :, :num_past], slots, scaling)
    output, log_mass = merge(parts)
    return output.view(*query.shape[:3], -1), log_mass.reshape(query.shape[:3])


def past_parts(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the keys that all queries attend to: exact entries, and slots; either may be missing.

    Args:
        query: (1, num_heads, num_queries, head_dim).
        key, value: (1, num_heads, num_keys, head_dim or value_dim).
    """
    parts = [partial_attention(query, key, value, None, scaling)] if key.shape[2] else []
    return parts if slots is None else [*parts, _slots_part(query, slots, scaling)]


def _causal_part(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention among the new tokens, in the packed shapes of `partial_attention`."""
    num_heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output, lse = partial_attention(query, key, value, None, scaling, is_causal=True)
    return output.reshape(1, num_heads, -1, output.shape[-1]), lse.reshape(1, num_heads, -1)


def _slots_part(query: Tensor, slots: Slots, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of each head over its slots; a head without slots has no mass."""
    outputs, lses = [], []
    for head, (key, value, bias) in enumerate(slots.heads):
        if key.shape[2]:
            output, lse = partial_attention(query[:, head : head + 1], key, value, bias, scaling)
        else:
            output = query.new_zeros(*query[:, head : head + 1].shape[:3], value.shape[3])
            lse = output.new_full(output.shape[:-1], -torch.inf, dtype=torch.float32)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the (output, log-sum-exp) of each set.

    In the first part every query must have some mass.
    """
    total, log_mass = parts[0]
    for output, lse in parts[1:]:
        before, log_mass = log_mass, torch.logaddexp(log_mass, lse)
        total = torch.lerp(output.float(), total.float(), (before - log_mass).exp_()[..., None])
    return total.to(parts[0][0].dtype), log_mass


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention over one set of keys, and the log of its mass.

    Args:
        query: (num_rows, num_heads, num_queries, head_dim).
        key, value: (num_rows, num_heads, num_keys, head_dim or value_dim).
        bias: (num_rows, 1, 1, num_keys), added to every score; None for zero.
        is_causal: query i attends to keys 0..i only.

    Returns:
        output (num_rows, num_heads, num_queries, value_dim); log-sum-exp (num_rows, num_heads, num_queries), float32.
    """
    if query.device.type == "cpu":
        value_dim, width = value.shape[3], max(value.shape[3], key.shape[3])
        query, key, value = (pad(entries, (0, width - entries.shape[3])) for entries in (query, key, value))
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scaling
        )
        return output[..., :value_dim], lse
    return plain_partial_attention(query, key, value, bias, scaling, is_causal=is_causal)


def plain_partial_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """`partial_attention` in plain operations, a block of queries at a time: the definition and the fallback."""
    block = max(MAX_SCORES // max(key.shape[1] * key.shape[2], 1), 1)
    outputs, lses = [], []
    for start in range(0, query.shape[2], block):
        # In float32, as in fused kernels: bfloat16 rounds a score of 20 to a multiple of 0.125.
        scores = query[:, :, start : start + block].float() @ key.float().transpose(-1, -2) * scaling
        if bias is not None:
            scores = scores + bias.float()
        if is_causal:
            rows = torch.arange(start, start + scores.shape[2], device=scores.device)
            columns = torch.arange(key.shape[2], device=scores.device)
            scores.masked_fill_(columns[None] > rows[:, None], -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        outputs.append((scores - lse).exp_().to(value.dtype) @ value)
        lses.append(lse[..., 0])
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)
