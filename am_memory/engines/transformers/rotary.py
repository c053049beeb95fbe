"""How a transformers model turns its keys with their position: its own frequencies, tried on a token that stands alone.

A token alone attends to itself, whatever its position: its keys at two positions differ by the turn alone, at every
layer. So which elements turn together, how many do, and which of several frequencies a layer has is seen, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from am_memory.engines.transformers.support import cache_argument
from am_memory.errors import UnsupportedModel
from am_memory.rotation import Rotation

TOLERANCE = 5e-2
"""Of what a turned key is off, relative to it: rounding, in bfloat16 too. What does not fit is off by about 1."""
LENGTH_DEPENDENT = {"dynamic", "longrope"}
"""RoPE whose frequencies change with the length of the text: keys of two lengths differ by more than a turn."""


def layer_rotations(model: PreTrainedModel) -> list[Rotation]:
    """How each of the model's layers turns its keys; a layer without positions turns none of their elements.

    Raises:
        UnsupportedModel: keys cannot be turned to other positions, and why.
    """
    if kinds := length_dependent_kinds(model):
        raise UnsupportedModel(f"its RoPE depends on the length of the text (rope_type {', '.join(sorted(kinds))})")
    distance = model.config.get_text_config(decoder=True).max_position_embeddings - 1
    candidates = list(_candidates(model))
    pairs = zip(_lone_keys(model, 0), _lone_keys(model, distance), strict=True)
    return [_fitting(candidates, start, later, distance) for start, later in pairs]


def length_dependent_kinds(model: PreTrainedModel) -> set[str]:
    """Of the model's RoPE; transformers sets its frequencies anew in a pass, for every other pass as well."""
    return _rope_types(model.config.get_text_config(decoder=True)) & LENGTH_DEPENDENT


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Of all layers: the parameters are one set for all, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    return {str(each.get("rope_type", "default")) for each in sets}


def _candidates(model: PreTrainedModel) -> Iterator[Rotation]:
    """No turn, and each of the model's frequencies on pairs from two halves and on pairs of neighbours."""
    nothing = torch.empty(0, dtype=torch.long)
    yield Rotation(nothing, nothing, torch.empty(0, dtype=torch.double))
    for name, frequencies in model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name:
            speeds = frequencies.detach().double().cpu()
            elements = torch.arange(2 * len(speeds))
            yield Rotation(elements[: len(speeds)], elements[len(speeds) :], speeds)
            yield Rotation(elements[::2], elements[1::2], speeds)


@torch.no_grad()
def _lone_keys(model: PreTrainedModel, position: int) -> list[Tensor]:
    """Of a token that stands alone at this position, of each layer: (num_key_value_heads, 1, head_dim)."""
    ids = torch.tensor([[model.config.get_text_config(decoder=True).vocab_size // 2]], device=model.device)
    cache = DynamicCache(config=model.config)
    positions = torch.tensor([[position]], device=model.device)
    try:
        model.base_model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_argument(model): cache})
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as reason:
        raise UnsupportedModel(f"it cannot read a token at position {position}: {reason}") from reason
    return [layer.keys[0] for layer in cache.layers]  # type: ignore[index, union-attr]


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
