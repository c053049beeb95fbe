"""Positions of text in models whose RoPE has several axes (M-RoPE), for the sake of images and videos.

Text has the same position on all axes. Such a model remembers by how much the images of its last text moved what
followed. This is not true of a `KVCache`, which holds text alone, and of several texts in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from am_memory.engines.transformers.driven import CACHE_NAMES
from am_memory.engines.transformers.in_place import InPlaceOf
from am_memory.kv_cache.cache import KVCache


def use_text_positions(model: PreTrainedModel) -> None:
    """Give tokens that are read into a `KVCache` the positions of plain text, if the model would compute others.

    Other caches get what the model computes.
    """
    if any(hasattr(module, "rope_deltas") for module in model.modules()):
        base: Any = model.base_model
        base.forward = InPlaceOf(base.forward, _with_text_positions(base.forward))


def _with_text_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    def with_text_positions(*args: Any, **kwargs: Any) -> Any:
        cache = next((kwargs[name] for name in CACHE_NAMES if isinstance(kwargs.get(name), KVCache)), None)
        if cache is None:
            return forward(*args, **kwargs)
        given: Tensor | None = kwargs.get("position_ids")
        ids: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        if given is None or given.ndim == 3:  # (axes, 1, num_tokens), as the model computed them
            kwargs["position_ids"] = cache.num_tokens + torch.arange(ids.shape[1], device=ids.device)[None]
        return forward(*args, **kwargs)

    return with_text_positions
