"""Models that peft has wrapped, or put adapters into: which module runs, and through which adapters.

What a cache holds depends on the adapters that were active when it was read. Knows peft by what it leaves in a model,
and never imports it: who has such a model has done so.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from am_memory.errors import UnsupportedModel, UnsupportedOperation

Active = tuple[tuple[str, object], ...]
"""Adapters, each with its scaling."""
FOR_ONE_CALL = frozenset({"adapter_names", "alora_offsets"})
"""Arguments of a call by which peft chooses adapters text by text; it hangs them on the layers as hooks meanwhile."""


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model that runs, out of peft's wrapper if it is in one.

    Raises:
        UnsupportedModel: it is in another wrapper, or its adapter is no change of its weights.
    """
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
        config = model.peft_config[model.active_adapters[0]]
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UnsupportedModel(
                f"{type(model).__name__} has an adapter of kind {config.peft_type.value}, which puts something before "
                "the text that no cache of ours holds; use an adapter that changes weights (LoRA and its kin)"
            )
        model = model.base_model.model
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is no model of transformers, but something around one; give the model itself"
        )
    return model


def described(active: object) -> str:
    """`Adapters.active` for people."""
    if not isinstance(active, tuple):
        return "without adapters"
    names = [[name for name, _ in each] for each in active]
    texts = [f"{what} {', '.join(each)}" for what, each in zip(("with", "merged with"), names, strict=True) if each]
    return " and ".join(texts)


class Adapters:
    """The adapters that peft has put into a model, now or later.

    Args:
        model: of transformers, not wrapped.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._seen: tuple[dict[str, Any], str, Any] | None = None

    @property
    def active(self) -> tuple[Active, Active] | None:
        """What the weights are seen through, and what is merged into them, to be compared; None: they are themselves.

        As cheap as can be, as every pass asks.

        Raises:
            UnsupportedOperation: adapters are chosen for each text of a call.
        """
        if self._model.__dict__.get("peft_config") is None or (layer := self._layer()) is None:
            return None
        if chosen := _chosen_for_one_call(layer):
            self._end_choice()
            raise UnsupportedOperation(
                f"{', '.join(sorted(set(chosen.values())))} chooses adapters for each text of a call, and a cache is "
                "read through the same ones from end to end: choose them by set_adapter()"
            )
        scaling = getattr(layer, "scaling", {})
        active = () if layer.disable_adapters else tuple((name, scaling.get(name)) for name in layer.active_adapters)
        merged = tuple((name, scaling.get(name)) for name in layer.merged_adapters)
        return (active, merged) if active or merged else None

    @property
    def hidden(self) -> frozenset[str]:
        """Adapters that are there, and not active."""
        active, merged = self.active or ((), ())
        return frozenset(self._model.__dict__.get("peft_config") or ()) - {name for name, _ in (*active, *merged)}

    def _end_choice(self) -> None:
        """Take away the hooks of the call under way: peft leaves them for good where an error ends the call."""
        for layer in self._model.modules():
            for key in _chosen_for_one_call(layer):
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def _layer(self) -> Any | None:
        """One that has adapters; peft sets all of them alike."""
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
    """The hooks of a layer by which peft chooses its adapters for one call, and the arguments that they are for."""
    return {
        key: name
        for key, hook in layer._forward_pre_hooks.items()
        if isinstance(hook, partial)
        for name in FOR_ONE_CALL & hook.keywords.keys()
    }
