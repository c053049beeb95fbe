"""Decoder layers compiled by `torch.compile`, for the steps that read one token.

A compiled layer is one graph from its first norm to its last sum. Appending to the cache and attention are one opaque
operator in it. No graph and no guard depends on the size of the cache, so nothing is compiled again as it grows. Steps
of several tokens (prompts) and other caches use the layer without compilation. Knows no slots.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from am_memory.engines.transformers import support
from am_memory.engines.transformers.attention import IS_DEFERRED, SINKS, SOFTCAP, attention_forward
from am_memory.errors import EngineFailed, UnsupportedModel
from am_memory.kv_cache.cache import KVCache

WITHOUT_COMPILING = "load it with compile=False"


class _Step(NamedTuple):
    """The layer that is about to run, as the operator needs it; hidden from the graph."""

    cache: KVCache
    attention: Any  # a module with a `layer_idx`
    mask: Tensor | None


class _Pending(threading.local):
    step: _Step | None = None


class _DeferredCache:
    """The cache that a graph sees: it passes new keys and values on, and the operator appends them."""

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key, value


_pending = _Pending()
_deferred_cache = _DeferredCache()


class CompiledLayer:
    """A decoder layer's `forward`, compiled for reading one token into a `KVCache`, unchanged for everything else.

    Args:
        layer: a decoder layer of transformers.

    Attributes:
        eager: the layer's own `forward`.
        has_run: whether the compiled layer was ever used.

    Raises:
        UnsupportedModel: the layer does not have exactly one attention module.
    """

    def __init__(self, layer: nn.Module) -> None:
        attentions = [part for part in layer.modules() if part is not layer and hasattr(part, "layer_idx")]
        if len(attentions) != 1:
            raise UnsupportedModel(
                f"{type(layer).__name__} has {len(attentions)} parts that use a cache: {WITHOUT_COMPILING}"
            )
        self.eager = layer.forward
        self.has_run = False
        self._layer, self._attention = layer, attentions[0]
        # Without transformers' wrappers: all layer classes share their code, and torch counts recompilations by code.
        self._compiled: Callable[..., Any] = torch.compile(inspect.unwrap(type(layer).forward), dynamic=False)

    def __call__(self, hidden_states: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        name = next((name for name, value in kwargs.items() if isinstance(value, KVCache)), None)
        if name is None or hidden_states.shape[1] != 1 or torch.is_grad_enabled():
            return self.eager(hidden_states, *args, attention_mask=attention_mask, **kwargs)
        self.has_run = True
        _pending.step = _Step(kwargs[name], self._attention, attention_mask)
        kwargs |= {name: _deferred_cache, IS_DEFERRED: True}
        return self._compiled(self._layer, hidden_states, *args, attention_mask=None, **kwargs)


def compile_layers(model: PreTrainedModel, cache: KVCache) -> None:
    """Compile a model's decoder layers, which takes some seconds, and test them. The model must use our attention.

    Layers with a recurrent state are not compiled.

    Args:
        cache: a new one, for the test.

    Raises:
        EngineFailed: torch.compile fails for this model or on this machine. The model is unchanged.
        UnsupportedModel: the compiled model computes wrong logits. The model is unchanged.
    """
    if any(kind.has_latents for kind in cache.kinds):
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be compiled layer by layer (it caches latents): {WITHOUT_COMPILING}"
        )
    if any(kind.num_readers > 1 for kind in cache.kinds):
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be compiled layer by layer (its layers share a cache): {WITHOUT_COMPILING}"
        )
    layers = [
        layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer) and _has_keys(layer, cache)
    ]
    compiled = [CompiledLayer(layer) for layer in layers]
    try:
        for layer, forward in zip(layers, compiled, strict=True):
            layer.forward = forward
        _require_use(model, compiled, cache)
    except BaseException:
        for layer, forward in zip(layers, compiled, strict=True):
            layer.forward = forward.eager
        raise


def _has_keys(layer: nn.Module, cache: KVCache) -> bool:
    """Whether a decoder layer has attention and no recurrent state, which its operator does not hand on."""
    indices: set[Any] = {part.layer_idx for part in layer.modules() if hasattr(part, "layer_idx")}
    return any(cache.kinds[index].has_keys for index in indices) and not cache.recurrent.keys() & indices


def _require_use(model: PreTrainedModel, layers: list[CompiledLayer], cache: KVCache) -> None:
    name = type(model).__name__
    try:
        with torch.no_grad():
            is_same = support.logits_error(model, cache) is None
    # A layer may take no further arguments, or ask the cache for its length.
    except (TypeError, torch._dynamo.exc.Unsupported) as error:
        raise UnsupportedModel(
            f"{name} cannot be compiled layer by layer ({_reason(error)}): {WITHOUT_COMPILING}"
        ) from error
    except RuntimeError as error:
        raise EngineFailed(
            f"torch.compile fails for {name} on this machine ({_reason(error)}): {WITHOUT_COMPILING}; on a CPU it "
            "needs a C++ compiler, on a GPU Triton and a C compiler"
        ) from error
    if not layers or not is_same or not all(layer.has_run for layer in layers):
        raise UnsupportedModel(f"{name} computes something else with compiled layers: {WITHOUT_COMPILING}")


def _reason(error: Exception) -> str:
    """The error without the advice that torch adds."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__


def _append_and_attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    """Append the token to the running layer's cache, and attend; shapes as in `attention_forward`."""
    step, _pending.step = _pending.step, None
    assert step is not None
    layer_idx = step.attention.layer_idx
    if getattr(step.cache.layers[layer_idx], "query_sink", None) is not None:
        query = query.clone()  # the graph reuses its buffers, and a sink may keep the query
    key, value = step.cache.update(key, value, layer_idx)
    options = {SINKS: sinks, SOFTCAP: softcap}
    return attention_forward(step.attention, query, key, value, step.mask, scaling, **options)[0]


def _shape_only(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    return query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3])


_library: Any = torch.library.Library("am_memory", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "append_and_attend(Tensor query, Tensor key, Tensor value, float? scaling, Tensor? sinks, float? softcap) -> Tensor"
)
_library.impl("append_and_attend", _append_and_attend, "CompositeExplicitAutograd")
torch.library.register_fake("am_memory::append_and_attend", _shape_only, lib=_library)
