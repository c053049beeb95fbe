"""Models with adapters of peft: the module that runs, and the adapters that are active.

The entries of a cache depend on the adapters that were active when its tokens were read. This module recognises peft by
its traces in a model and never imports it: whoever has such a model has imported peft already.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from am_memory.errors import UnsupportedModel, UnsupportedOperation

Active = tuple[tuple[str, object], ...]
"""Names of adapters, each with its scaling."""
FOR_ONE_CALL = frozenset({"adapter_names", "alora_offsets"})
"""Arguments with which a call chooses adapters for each text. peft adds hooks to the layers during that call."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without peft's wrapper.

    Raises:
        UnsupportedModel: it has another wrapper, or its adapter does not change weights.
    """
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        config = model.peft_config[model.active_adapters[0]]
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UnsupportedModel(
                f"{type(model).__name__} has an adapter of kind {config.peft_type.value}, which adds virtual tokens "
                "that our caches do not hold; use an adapter that changes weights (LoRA and similar ones)"
            )
        model = model.base_model.model
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a transformers model but a wrapper around one; pass the model itself"
        )
    return model


def described(active: object) -> str:
    """`Adapters.active` in words."""
    if not isinstance(active, tuple):
        return "without adapters"
    names = [[name for name, _ in adapters] for adapters in active]
    ways = zip(("with", "merged with"), names, strict=True)
    texts = [f"{way} {', '.join(adapters)}" for way, adapters in ways if adapters]
    return " and ".join(texts)


class Adapters:
    """The adapters of peft in a model, also those that are added later.

    Args:
        model: a transformers model without wrapper.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen: tuple[dict[str, Any], str, Any] | None = None

    @property
    def active(self) -> tuple[Active, Active] | None:
        """The active and the merged adapters, to be compared; None if there are none. Cheap: every pass asks.

        Raises:
            UnsupportedOperation: a call chooses adapters for each of its texts.
        """
        if self._model.__dict__.get("peft_config") is None or (layer := self._layer()) is None:
            return None
        if chosen := _chosen_for_one_call(layer):
            self._end_choice()
            raise UnsupportedOperation(
                f"{', '.join(sorted(set(chosen.values())))} chooses adapters for each text of a call, and all tokens "
                "of a cache must have the same adapters: choose them with set_adapter()"
            )
        scaling = getattr(layer, "scaling", {})
        active = () if layer.disable_adapters else tuple((name, scaling.get(name)) for name in layer.active_adapters)
        merged = tuple((name, scaling.get(name)) for name in layer.merged_adapters)
        return (active, merged) if active or merged else None

    @property
    def hidden(self) -> frozenset[str]:
        """Adapters that are in the model but not active."""
        active, merged = self.active or ((), ())
        return frozenset(self._model.__dict__.get("peft_config") or ()) - {name for name, _ in (*active, *merged)}

    def _end_choice(self) -> None:
        """Remove the hooks of the current call; peft leaves them in the model if the call raises."""
        for layer in self._model.modules():
            for key in _chosen_for_one_call(layer):
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def _layer(self) -> Any | None:
        """A layer with adapters; peft treats all of them alike."""
        if self._seen is not None:
            siblings, name, layer = self._seen
            if siblings.get(name) is layer:
                return layer
        for parent in self._model.modules():
            for name, layer in parent._modules.items():
                if hasattr(layer, "merged_adapters") and hasattr(layer, "active_adapters"):
                    self._seen = parent._modules, name, layer
                    return layer
        return None


def _chosen_for_one_call(layer: nn.Module) -> dict[int, str]:
    """The layer's hooks with which peft chooses adapters for one call, with the name of the argument."""
    return {
        key: name
        for key, hook in layer._forward_pre_hooks.items()
        if isinstance(hook, partial)
        for name in FOR_ONE_CALL & hook.keywords.keys()
    }
