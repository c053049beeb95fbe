"""Attention over ragged, biased slots and an exact tail, as an attention function of transformers.

`fused.py` computes it on GPUs that run our kernels, `partwise.py` everywhere else. Does not know how slots are made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.generic import TransformersKwargs

from am_memory.engines import partwise
from am_memory.engines.branches import BranchLayer
from am_memory.engines.transformers import capped, fused
from am_memory.engines.transformers.latents import LatentHeads, has_latents
from am_memory.engines.transformers.sinks import sdpa_with_sinks, with_sinks
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.batch import BatchLayer
from am_memory.kv_cache.layers import CompactableLayer, SlidingLayer
from am_memory.kv_cache.slots import Slots

ATTENTION_NAME = "am_memory"
IRRELEVANT = frozenset({
    *TransformersKwargs.__annotations__, "dropout", "sliding_window", "use_cache", "output_attentions", "deterministic",
    "logits_to_keep",
})  # fmt: skip
"""Arguments that do not change attention over one text without padding, in a layer of full attention."""
SINKS = "s_aux"
"""Argument of attention with learned sinks: the logit of each head's sink."""
SOFTCAP = "softcap"
"""Argument of attention with capped scores: no score is farther from 0."""
IS_DEFERRED = "am_memory_is_deferred"
"""Argument of a compiled layer (`compiled.py`), in which one operator appends to the cache and attends."""
NO_MASK = (
    "a padded prompt, or a mask that is not causal, cannot be read into a compacting cache: "
    "pass one sequence without padding"
)


def register() -> None:
    """Make `ATTENTION_NAME` an attention implementation that any transformers model can be set to."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_of_heads`, in which one wide head of latents may stand for the module's heads."""
    if not hasattr(key, "am_layer") or not has_latents(module):
        return attention_of_heads(module, query, key, value, attention_mask, scaling, **kwargs)
    heads = LatentHeads(module)
    output, _ = attention_of_heads(module, heads.queries(query), key, value, attention_mask, scaling, **kwargs)
    return heads.outputs(output), None


def attention_of_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface of transformers; for any other cache it is transformers' own sdpa attention.

    Args:
        query: (1, num_attention_heads, num_tokens, head_dim).
        key, value: (1, num_key_value_heads, tail_tokens, head_dim or value_dim), the new tokens last.

    Returns:
        (1, num_tokens, num_attention_heads, value_dim), and None for the weights.
    """
    is_deferred, sinks, softcap = kwargs.pop(IS_DEFERRED, False), kwargs.pop(SINKS, None), kwargs.pop(SOFTCAP, None)
    layer: CompactableLayer | BranchLayer | BatchLayer | None = None if is_deferred else getattr(key, "am_layer", None)
    if layer is None and not is_deferred:
        if softcap is not None:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output, _ = with_sinks(*capped.attend_with_mask(query, key, value, attention_mask, scaling, softcap), sinks)
            return output.transpose(1, 2).contiguous(), None
        if sinks is not None:
            return sdpa_with_sinks(query, key, value, attention_mask, scaling, sinks), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(layer, BatchLayer):
        attention_mask = None  # a single token attends to all that its own cache holds
    if attention_mask is not None and not _is_causal(attention_mask, query.shape[2]):
        raise UnsupportedOperation(NO_MASK)
    if strange := [name for name, value in kwargs.items() if value is not None and name not in IRRELEVANT]:
        raise UnsupportedOperation(f"attention with {', '.join(strange)} cannot be compacted: use another model")
    if layer is None:
        return torch.ops.am_memory.append_and_attend(query, key, value, scaling, sinks, softcap), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layer, BranchLayer):
        output, _ = with_sinks(*layer.attend(query, scaling), sinks)
        return output.transpose(1, 2).contiguous(), None
    if isinstance(layer, BatchLayer):
        rows = zip(layer.layers, query.tensor_split(len(layer.layers)), layer.entries, strict=True)
        output = torch.cat([_attend_in(one, row, *entries, scaling, sinks, softcap) for one, row, entries in rows])
    else:
        output = _attend_in(layer, query, key, value, scaling, sinks, softcap)
    return output.transpose(1, 2).contiguous(), None


def _is_causal(mask: Tensor, num_tokens: int) -> bool:
    """Whether a mask hides later tokens alone; some models make one where none is needed.

    Args:
        mask: (batch, 1, num_tokens, num_keys), of bool or added to the scores; the last keys are the tokens' own.
    """
    num_keys = mask.shape[-1]
    is_seen = mask if mask.dtype == torch.bool else mask == 0
    expected = is_seen.new_ones(num_tokens, num_keys).tril(num_keys - num_tokens)
    return mask.shape[-2] == num_tokens and bool((is_seen == expected).all())


def _attend_in(
    layer: CompactableLayer | SlidingLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Attention of the newest tokens of one cache, whose queries are handed out.

    Args:
        layer: a window only with a single token, which attends to all its keys.
    """
    if isinstance(layer, SlidingLayer):
        output, _ = _attend_with_sinks(query, key, value, None, scaling, sinks, softcap)
        return output
    if layer.num_readers > 1:
        _require_alike(layer, scaling, sinks)
    layer.scaling, layer.sinks, layer.softcap, slots = scaling, sinks, softcap, layer.slots
    output, log_mass = attend_to(layer, query, key, value, layer.write_position)
    if layer.query_sink is not None:
        grouped = key.shape[1], -1, query.shape[2]
        layer.hand_out(query.reshape(*grouped, query.shape[3]), log_mass.reshape(grouped))
        if layer.slots is not slots:  # compacted by these very queries
            output, _ = attend_to(layer, query, *layer.tail)
    return output


def _require_alike(layer: CompactableLayer, scaling: float, sinks: Tensor | None) -> None:
    """Raise UnsupportedOperation if the layers that read a cache attend in ways that no one layer can have."""
    if sinks is not None or layer.scaling not in (None, scaling):
        raise UnsupportedOperation(
            "layers that share a cache cannot have attention sinks, or scales that differ: use another model"
        )


def attend_to(
    layer: CompactableLayer, query: Tensor, key: Tensor, value: Tensor, write_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over a layer's slots, these keys and its sink; see `attend` for arguments and results."""
    assert layer.scaling is not None
    return _attend_with_sinks(
        query, key, value, layer.slots, layer.scaling, layer.sinks, layer.softcap, write_position=write_position
    )


def _attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots | None,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
    *,
    write_position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over slots, keys and sinks; scores may be capped. See `attend` for arguments and results."""
    if softcap is None:
        parts = attend(query, key, value, slots, scaling, write_position)
    elif write_position is not None:
        raise RuntimeError("there is no kernel that caps scores")
    else:
        parts = capped.attend(query, key, value, slots.decoded() if slots is not None else None, scaling, softcap)
    return with_sinks(*parts, sinks)


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float, write_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention over compact slots and an exact tail.

    Args:
        query: (1, num_attention_heads, num_tokens, head_dim).
        key, value: (1, num_key_value_heads, tail_tokens, head_dim or value_dim), the new tokens last.
        slots: the entries before the tail. Int8 rows are decoded by the kernel, or layer by layer.
        scaling: softmax scale.
        write_position: (1,) int64 in a GPU's memory, where in the tail the new tokens begin; nothing behind the last of
            them is attended to. None: the new tokens end the tail.

    Returns:
        output (1, num_attention_heads, num_tokens, value_dim), and the log of each query's attention mass on all keys,
        (1, num_attention_heads, num_tokens) float32.
    """
    if fused.can_attend(query, value):
        return fused.attend(query, key, value, slots, scaling, write_position)
    if write_position is not None:
        raise RuntimeError("there is no kernel for this GPU, dtype, head_dim or value_dim")
    return partwise.attend(query, key, value, slots.decoded() if slots is not None else None, scaling)
