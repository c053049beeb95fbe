"""Layers that attend to the keys and values of an earlier layer, and have none of their own (Gemma 3n, Gemma 4 E2B).

The cache has one layer for all of them, whose slots are fitted to the queries of all. Knows no cache and no slots.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from am_memory.engines.transformers.in_place import InPlaceOf
from am_memory.kv_cache.cache import KVCache

SKIP = "_maybe_slice_kv_shared_inputs"
"""The method of a model that leaves out tokens before the layers without keys, as far as no logits are wanted."""


def num_readers(config: PreTrainedConfig) -> list[int]:
    """How many layers attend to the keys of each layer, itself included: (num_hidden_layers,).

    Layers that share keys are of one type. The last one of them that has keys gives them to those without.
    """
    modes = getattr(config, "kv_sharing_modes", None) or [None] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [None] * len(modes)
    reusing = Counter(kind for kind, mode in zip(types, modes, strict=True) if mode == "reuse")
    return [1 + reusing[kind] * (mode == "store") for kind, mode in zip(types, modes, strict=True)]


def skips_tokens(model: PreTrainedModel) -> bool:
    """Whether the model leaves out tokens of which no logits are wanted in the layers without keys."""
    has_readers = max(num_readers(model.config.get_text_config(decoder=True))) > 1
    return has_readers and any(hasattr(module, SKIP) for module in model.modules())


def keep_wanted_tokens(model: PreTrainedModel) -> None:
    """Let a model leave out no token whose queries are wanted, and none that its mask cannot do without."""
    for module in model.modules():
        if hasattr(module, SKIP):
            skip = getattr(module, SKIP)
            setattr(module, SKIP, InPlaceOf(skip, partial(_unless_wanted, skip)))


def _unless_wanted(
    skip: Any, hidden_states: Any, per_layer_inputs: Any, positions: Any, masks: Any, logits_to_keep: Any,
    cache: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    """The inputs of the layers without keys; arguments and results are those of the model's method."""
    has_sinks = isinstance(cache, KVCache) and any(layer.query_sink is not None for layer in cache.compactable)
    # Without a mask, attention takes the queries for those of the first tokens; a single one may attend to all.
    is_last_token = isinstance(logits_to_keep, int) and logits_to_keep == 1
    has_masks = all(isinstance(mask, Tensor) for mask in masks.values())
    may_skip = is_last_token and not getattr(cache, "is_compileable", False)
    if has_sinks or per_layer_inputs is None or not (may_skip or has_masks):
        return hidden_states, per_layer_inputs, positions, masks
    return skip(hidden_states, per_layer_inputs, positions, masks, logits_to_keep, cache=cache, **kwargs)
