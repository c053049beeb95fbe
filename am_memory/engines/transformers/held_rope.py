"""Holds a RoPE whose frequencies depend on the length of the text at one set of frequencies, for our caches.

Cached keys are rotated by the frequencies of the moment they were written. If the frequencies changed later, old keys
would not fit new queries. So such a model uses one set of frequencies for a `KVCache`, and is unchanged otherwise.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from am_memory.engines.transformers.in_place import InPlaceOf
from am_memory.errors import UnsupportedModel

LENGTH_DEPENDENT = ("dynamic", "longrope")

Parameters = dict[str, Any]


def rope_parameters(config: PreTrainedConfig) -> dict[str | None, Parameters]:
    """The RoPE parameters by kind of layer; under None if all layers share them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets: dict[str | None, Parameters] = {kind: own for kind, own in parameters.items() if isinstance(own, dict)}
    return sets or {None: parameters}


def length_dependent_kinds(model: PreTrainedModel) -> set[str]:
    """The RoPE types of the model that depend on the length of the text."""
    sets = rope_parameters(model.config.get_text_config(decoder=True)).values()
    return {str(parameters.get("rope_type")) for parameters in sets}.intersection(LENGTH_DEPENDENT)


def require_choice(model: PreTrainedModel, window_tokens: int | None) -> None:
    """Raise UnsupportedModel if the model has two sets of frequencies and `window_tokens` does not choose one."""
    config = model.config.get_text_config(decoder=True)
    window = config.max_position_embeddings
    for parameters in rope_parameters(config).values():
        changes_at = parameters.get("original_max_position_embeddings", window)
        if parameters.get("rope_type") == "longrope" and window_tokens is None and changes_at < window:
            raise UnsupportedModel(
                f"{type(model).__name__} rotates its keys by other factors in texts of more than {changes_at:,} tokens "
                f"(rope_type longrope), and cached keys are not rotated again; choose the factors: "
                f"window_tokens={changes_at} for the short factors, window_tokens={window} for the long ones"
            )


class HeldRope:
    """The RoPE of a model, held at one set of frequencies for the caches of one engine.

    Args:
        model: has a RoPE of a type in `LENGTH_DEPENDENT`.
        window_tokens: "longrope" uses its long factors if this is above the original window, else the short ones;
            "dynamic" uses the frequencies of texts within the window.

    Attributes:
        sets: the frequencies in use, "long" or "short", for each kind of layer.
        changes_at: the length of text after which the model alone would change its frequencies.
        modules: copies of the model's RoPE modules whose frequencies never change.
    """

    def __init__(self, model: PreTrainedModel, window_tokens: int) -> None:
        self._here = threading.local()
        self.sets = _chosen(model, window_tokens)
        config = model.config.get_text_config(decoder=True)
        self.changes_at = min(_changes_at(config, kind) for kind in self.sets)
        self.modules: list[nn.Module] = []
        for module in list(filter(_changes, model.modules())):
            twin = self._held(module)
            self.modules.append(twin)
            module.forward = self._either(module.forward, twin.forward)
        base = model.base_model
        base.forward = self._holding(base.forward)

    def is_of(self, cache: Cache) -> bool:
        """Whether a cache belongs to this; several engines may hold one model in different ways."""
        return getattr(cache, "held_rope", None) is self

    def _held(self, module: nn.Module) -> nn.Module:
        """A copy of a RoPE module whose frequencies never change."""
        twin: Any = copy.deepcopy(module)
        twin.config = module.config
        kinds = {None: twin.rope_type} if isinstance(twin.rope_type, str) else dict(twin.rope_type)
        for kind, rope_type in kinds.items():
            if rope_type in LENGTH_DEPENDENT:
                prefix = "" if kind is None else f"{kind}_"
                frequencies: Tensor = getattr(twin, f"{prefix}original_inv_freq")
                if self.sets.get(kind) == "long":
                    frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](
                        twin.config, frequencies.device, seq_len=_changes_at(twin.config, kind) + 1, layer_type=kind
                    )
                getattr(twin, f"{prefix}inv_freq").data = frequencies.clone()
                kinds[kind] = "default"
        twin.rope_type = kinds.get(None, kinds)
        return twin  # type: ignore[no-any-return]

    def _either(self, forward: Callable[..., Any], held: Callable[..., Any]) -> Callable[..., Any]:
        """A RoPE module's forward; in a pass with our cache, its copy's."""

        def either(*args: Any, **kwargs: Any) -> Any:
            return (held if getattr(self._here, "is_held", False) else forward)(*args, **kwargs)

        return InPlaceOf(forward, either)

    def _holding(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The base model's forward, which holds the RoPE in passes with our cache."""

        def held(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, Cache) and self.is_of(value) for value in (*args, *kwargs.values())):
                return forward(*args, **kwargs)
            try:
                self._here.is_held = True
                return forward(*args, **kwargs)
            finally:
                self._here.is_held = False

        return InPlaceOf(forward, held)


def _changes(module: nn.Module) -> bool:
    """Whether a module is a RoPE whose frequencies change."""
    kinds = getattr(module, "rope_type", None)
    return bool(set(kinds.values() if isinstance(kinds, dict) else [kinds]).intersection(LENGTH_DEPENDENT))


def _chosen(model: PreTrainedModel, window_tokens: int) -> dict[str | None, str]:
    """The frequencies in use for each set of parameters that depends on the length."""
    config = model.config.get_text_config(decoder=True)
    return {
        kind: "long" if parameters["rope_type"] == "longrope" and window_tokens > _changes_at(config, kind) else "short"
        for kind, parameters in rope_parameters(config).items()
        if parameters.get("rope_type") in LENGTH_DEPENDENT
    }


def _changes_at(config: PreTrainedConfig, kind: str | None) -> int:
    parameters = rope_parameters(config)[kind]
    return int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
