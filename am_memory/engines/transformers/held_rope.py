"""A RoPE whose frequencies change with the length of the text, held at one length for the caches of this project.

Keys that are cached were turned by the frequencies of their time, and nothing turns them again: after a change, old
keys and new queries would not fit. So a model of such a kind reads into our caches by one set of frequencies, and turns
by the length as ever for everything else. Knows no cache's inside.
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

from am_memory.engines.transformers.driven import InPlaceOf
from am_memory.errors import UnsupportedModel

LENGTH_DEPENDENT = ("dynamic", "longrope")

Parameters = dict[str, Any]


def rope_parameters(config: PreTrainedConfig) -> dict[str | None, Parameters]:
    """The parameters of the RoPE, for each kind of layer that has its own; under None if all layers share one set."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sets: dict[str | None, Parameters] = {kind: each for kind, each in parameters.items() if isinstance(each, dict)}
    return sets or {None: parameters}


def length_dependent_kinds(model: PreTrainedModel) -> set[str]:
    """Of the model's RoPE."""
    sets = rope_parameters(model.config.get_text_config(decoder=True)).values()
    return {str(each.get("rope_type")) for each in sets}.intersection(LENGTH_DEPENDENT)


def require_choice(model: PreTrainedModel, window_tokens: int | None) -> None:
    """Raise UnsupportedModel for a model with two sets of frequencies where nobody has chosen one, by the window."""
    config = model.config.get_text_config(decoder=True)
    window = config.max_position_embeddings
    for each in rope_parameters(config).values():
        changes_at = each.get("original_max_position_embeddings", window)
        if each.get("rope_type") == "longrope" and window_tokens is None and changes_at < window:
            raise UnsupportedModel(
                f"{type(model).__name__} turns its keys by other factors in texts of more than {changes_at:,} tokens "
                f"(rope_type longrope), and keys that are cached are not turned again; say which to take: "
                f"window_tokens={changes_at} for the short factors, window_tokens={window} for the long ones"
            )


class HeldRope:
    """The RoPE of a model, held where it depends on the length of the text; installed once.

    Args:
        model: with a RoPE of a kind in `LENGTH_DEPENDENT`.
        window_tokens: "longrope" is held at its long factors if this is more than it was trained on before, else at
            the short ones; "dynamic" at the frequencies of all texts within the window.

    Attributes:
        sets: which frequencies are taken, "long" or "short", for each kind of layer.
        changes_at: the shortest text after which the model, by itself, takes others.
        modules: twins of the model's RoPE modules that never change.
    """

    def __init__(self, model: PreTrainedModel, window_tokens: int) -> None:
        self._here = threading.local()
        self.sets = _chosen(model, window_tokens)
        config = model.config.get_text_config(decoder=True)
        self.changes_at = min(_changes_at(config, kind) for kind in self.sets)
        self.modules: list[nn.Module] = []
        for module in [each for each in model.modules() if _changes(each)]:
            twin = self._held(module)
            self.modules.append(twin)
            module.forward = self._either(module.forward, twin.forward)
        base = model.base_model
        base.forward = self._holding(base.forward)

    def is_of(self, cache: Cache) -> bool:
        """Whether a cache is read into by this; a model may have engines that hold it in different ways."""
        return getattr(cache, "held_rope", None) is self

    def _held(self, module: nn.Module) -> nn.Module:
        """A twin of a RoPE module that never changes its frequencies."""
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
        """A RoPE module's forward, or its twin's while a pass is one of ours."""

        def either(*args: Any, **kwargs: Any) -> Any:
            return (held if getattr(self._here, "is_held", False) else forward)(*args, **kwargs)

        return InPlaceOf(forward, either)

    def _holding(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A base model's forward that holds the RoPE for caches of ours."""

        def held(*args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(each, Cache) and self.is_of(each) for each in (*args, *kwargs.values())):
                return forward(*args, **kwargs)
            try:
                self._here.is_held = True
                return forward(*args, **kwargs)
            finally:
                self._here.is_held = False

        return InPlaceOf(forward, held)


def _changes(module: nn.Module) -> bool:
    """Whether it is a RoPE module that changes its frequencies."""
    kinds = getattr(module, "rope_type", None)
    return bool(set(kinds.values() if isinstance(kinds, dict) else [kinds]).intersection(LENGTH_DEPENDENT))


def _chosen(model: PreTrainedModel, window_tokens: int) -> dict[str | None, str]:
    """Of each set of parameters that depends on the length, which frequencies are taken."""
    config = model.config.get_text_config(decoder=True)
    return {
        kind: "long" if each["rope_type"] == "longrope" and window_tokens > _changes_at(config, kind) else "short"
        for kind, each in rope_parameters(config).items()
        if each.get("rope_type") in LENGTH_DEPENDENT
    }


def _changes_at(config: PreTrainedConfig, kind: str | None) -> int:
    parameters = rope_parameters(config)[kind]
    return int(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
