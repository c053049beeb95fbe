"""Finds the RoPE of each layer: it tries the model's own frequencies on the keys of a single token.

A token that is alone attends only to itself. Its keys at two positions therefore differ by the rotation alone, in every
layer. So the pairs of elements, their number and the frequencies of each layer are measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from am_memory.engines.transformers.held_rope import HeldRope, length_dependent_kinds
from am_memory.engines.transformers.support import cache_argument
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer
from am_memory.kv_cache.rotation import Rotation

KEY_TOLERANCE = 5e-2
"""Largest relative error of a rotated key, in bfloat16 too; frequencies that do not fit have an error of about 1."""


def layer_rotations(
    model: PreTrainedModel, new_cache: Callable[[], KVCache] | None = None, held: HeldRope | None = None
) -> list[Rotation | None]:
    """The RoPE of each layer; a layer without positions rotates no elements. None: its cache has no keys to rotate.

    Args:
        new_cache: makes caches for the trial; None: caches of transformers.
        held: holds a RoPE that depends on the length of the text, for these caches.

    Raises:
        UnsupportedModel: the keys cannot be rotated, with the reason.
    """
    if held is None and (kinds := length_dependent_kinds(model)):
        raise UnsupportedModel(f"its RoPE depends on the length of the text (rope_type {', '.join(sorted(kinds))})")
    window = model.config.get_text_config(decoder=True).max_position_embeddings
    distances = [window - 1] if held is None else [max(held.changes_at - 1, 1), 2 * window]  # on both sides
    make = new_cache or partial(DynamicCache, config=model.config)
    start, *later = (_lone_keys(model, position, make()) for position in (0, *distances))
    candidates = list(_candidates([model] if held is None else held.modules))
    for keys, distance in zip(later, distances, strict=True):
        fitting = [
            None if before is None or after is None else _fitting(candidates, before, after, distance)
            for before, after in zip(start, keys, strict=True)
        ]
    return fitting


def _candidates(modules: Iterable[nn.Module]) -> Iterator[Rotation]:
    """No rotation, and each set of frequencies, for pairs from two halves and for pairs of neighbours."""
    nothing = torch.empty(0, dtype=torch.long)
    yield Rotation(nothing, nothing, torch.empty(0, dtype=torch.double))
    for name, frequencies in (named for module in modules for named in module.named_buffers()):
        if name.endswith("inv_freq") and "original" not in name:
            speeds = frequencies.detach().double().cpu()
            elements = torch.arange(2 * len(speeds))
            yield Rotation(elements[: len(speeds)], elements[len(speeds) :], speeds)
            yield Rotation(elements[::2], elements[1::2], speeds)


@torch.no_grad()
def _lone_keys(model: PreTrainedModel, position: int, cache: Cache) -> list[Tensor | None]:
    """The keys of a single token at this position, one tensor for each layer: (num_key_value_heads, 1, head_dim).

    None for a layer without keys.

    Args:
        cache: a new one.
    """
    ids = torch.tensor([[model.config.get_text_config(decoder=True).vocab_size // 2]], device=model.device)
    positions = torch.tensor([[position]], device=model.device)
    try:
        model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as reason:
        raise UnsupportedModel(f"it cannot read a token at position {position}: {reason}") from reason
    return [
        layer.exact_entries(0, 1)[0] if isinstance(layer, CompactableLayer) else _first(getattr(layer, "keys", None))
        for layer in cache.layers
    ]


def _first(keys: Tensor | None) -> Tensor | None:
    return None if keys is None else keys[0]


def _fitting(candidates: list[Rotation], start: Tensor, later: Tensor, distance: int) -> Rotation:
    """The candidate that rotates a layer's keys as the model does."""

    def error(candidate: Rotation) -> float:
        if 2 * len(candidate.speeds) > start.shape[-1]:
            return float("inf")
        turned = candidate.rotated(start, torch.tensor(distance)).float()
        return float((turned - later.float()).norm() / later.float().norm().clamp_min(1e-12))

    best = min(candidates, key=error)
    if not error(best) <= KEY_TOLERANCE:
        raise UnsupportedModel(
            f"its keys change with their position by more than a rotation (off by {error(best):.2g})"
        )
    return best
