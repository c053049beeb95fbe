"""Learned attention sinks: one more term in the denominator of each query head's softmax, which has no value.

With a sink a query can attend to nothing much. Knows no cache and no slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(output: Tensor, log_mass: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over some keys and the sinks, from attention over these keys alone.

    Args:
        output: (batch, num_attention_heads, num_tokens, head_dim).
        log_mass: (batch, num_attention_heads, num_tokens) float32, the log of each query's attention mass on the keys.
        sinks: (num_attention_heads,), the logit of each head's sink; None: there are none.

    Returns:
        Both, of keys and sinks together, in the dtypes in which they came.
    """
    if sinks is None:
        return output, log_mass
    total = torch.logaddexp(log_mass, sinks.float()[:, None])
    return (output * (log_mass - total).exp()[..., None]).to(output.dtype), total


def sdpa_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, sinks: Tensor
) -> Tensor:
    """Attention with sinks over a plain cache, by torch's own function: a sink is a zero key whose bias is its logit.

    Args:
        query: (batch, num_attention_heads, num_tokens, head_dim).
        key, value: (batch, num_key_value_heads, num_keys, head_dim), the new tokens last.
        mask: (batch, 1, num_tokens, num_keys), of bool or added to the scores; None: causal.
        scaling: softmax scale; None: one over the root of head_dim.
        sinks: (num_attention_heads,), the logit of each head's sink.

    Returns:
        (batch, num_tokens, num_attention_heads, head_dim).
    """
    batch, num_heads, num_tokens, _ = query.shape
    groups, num_keys = num_heads // key.shape[1], key.shape[2]
    if mask is None:
        mask = query.new_ones(num_tokens, num_keys, dtype=torch.bool).tril(num_keys - num_tokens)[None, None]
    if mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    bias = torch.cat(
        [
            mask.expand(batch, num_heads, num_tokens, num_keys).to(query.dtype),
            sinks.to(query.dtype)[None, :, None, None].expand(batch, num_heads, num_tokens, 1),
        ],
        dim=3,
    )
    key, value = (
        torch.nn.functional.pad(entries, (0, 0, 0, 1)).repeat_interleave(groups, dim=1) for entries in (key, value)
    )
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scaling)
    return output.transpose(1, 2).contiguous()
