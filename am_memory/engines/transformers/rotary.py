"""How a transformers model turns its keys with their position: its own frequencies, tried on a token that stands alone.

A token alone attends to itself, whatever its position: its keys at two positions differ by the turn alone, at every
layer. So which elements turn together, how many do, and which of several frequencies a layer has is seen, not assumed.
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

TOLERANCE = 5e-2
"""Of what a turned key is off, relative to it: rounding, in bfloat16 too. What does not fit is off by about 1."""


def layer_rotations(
    model: PreTrainedModel, new_cache: Callable[[], KVCache] | None = None, held: HeldRope | None = None
) -> list[Rotation]:
    """How each of the model's layers turns its keys; a layer without positions turns none of their elements.

    Args:
        new_cache: for the trial to use; None: one of transformers.
        held: what holds a RoPE that depends on the length of the text, in these caches.

    Raises:
        UnsupportedModel: keys cannot be turned to other positions, and why.
    """
    if held is None and (kinds := length_dependent_kinds(model)):
        raise UnsupportedModel(f"its RoPE depends on the length of the text (rope_type {', '.join(sorted(kinds))})")
    window = model.config.get_text_config(decoder=True).max_position_embeddings
    distances = [window - 1] if held is None else [max(held.changes_at - 1, 1), 2 * window]  # on both sides
    make = new_cache or partial(DynamicCache, config=model.config)
    start, *later = (_lone_keys(model, position, make()) for position in (0, *distances))
    candidates = list(_candidates([model] if held is None else held.modules))
    for keys, distance in zip(later, distances, strict=True):
        fitting = [_fitting(candidates, *pair, distance) for pair in zip(start, keys, strict=True)]
    return fitting


def _candidates(modules: Iterable[nn.Module]) -> Iterator[Rotation]:
    """No turn, and each of the frequencies there on pairs from two halves and on pairs of neighbours."""
    nothing = torch.empty(0, dtype=torch.long)
    yield Rotation(nothing, nothing, torch.empty(0, dtype=torch.double))
    for name, frequencies in (named for module in modules for named in module.named_buffers()):
        if name.endswith("inv_freq") and "original" not in name:
            speeds = frequencies.detach().double().cpu()
            elements = torch.arange(2 * len(speeds))
            yield Rotation(elements[: len(speeds)], elements[len(speeds) :], speeds)
            yield Rotation(elements[::2], elements[1::2], speeds)


@torch.no_grad()
def _lone_keys(model: PreTrainedModel, position: int, cache: Cache) -> list[Tensor]:
    """Of a token that stands alone at this position, of each layer: (num_key_value_heads, 1, head_dim).

    Args:
        cache: new, for the token.
    """
    ids = torch.tensor([[model.config.get_text_config(decoder=True).vocab_size // 2]], device=model.device)
    positions = torch.tensor([[position]], device=model.device)
    try:
        model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as reason:
        raise UnsupportedModel(f"it cannot read a token at position {position}: {reason}") from reason
    return [
        layer.exact_entries(0, 1)[0] if isinstance(layer, CompactableLayer) else layer.keys[0]  # type: ignore[index, union-attr]
        for layer in cache.layers
    ]


def _fitting(candidates: list[Rotation], start: Tensor, later: Tensor, distance: int) -> Rotation:
    """The one of the candidates that turns a layer's keys as the model does."""

    def error(candidate: Rotation) -> float:
        if 2 * len(candidate.speeds) > start.shape[-1]:
            return float("inf")
        turned = candidate.turned(start, torch.tensor(distance)).float()
        return float((turned - later.float()).norm() / later.float().norm().clamp_min(1e-12))

    best = min(candidates, key=error)
    if not error(best) <= TOLERANCE:
        raise UnsupportedModel(f"its keys change with their position by more than a turn (off by {error(best):.2g})")
    return best
