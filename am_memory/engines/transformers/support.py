"""Which transformers models can be compacted: first by their configuration, then by a test.

A model works if its layers are causal softmax attention over keys that never change once written. Models that cannot
work are refused with the reason. All others are compared with transformers' own attention on a few tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from am_memory.engines.transformers.attention import ATTENTION_NAME
from am_memory.engines.transformers.implementation import attention_setting, set_attention
from am_memory.engines.transformers.latents import has_latents
from am_memory.engines.transformers.shared_layers import num_readers
from am_memory.errors import InvalidInput, UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.kinds import LayerKind
from am_memory.kv_cache.layers import CompactableLayer
from am_memory.kv_cache.slots import Segment, Slots

PROBE_TOKENS = 8
PROBE_STEPS = ((0, 3), (3, 4), (4, PROBE_TOKENS))
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest RMS error of the probe's logits relative to their standard deviation, unless rounding alone is larger."""
MAX_ROUNDING = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest error that counts as rounding."""
WITHOUT_KEYS = frozenset({"linear_attention", "conv", "dummy"})
KNOWN_KINDS = WITHOUT_KEYS | {"full_attention", "sliding_attention", "chunked_attention", "hybrid"}
"""Kinds of layers that a `KVCache` can hold, as transformers names them."""
MAKE_ALIBI = ("build_alibi_tensor", "build_mpt_alibi_tensor")
"""Methods that make biases by distance."""
RECURRENT = "is recurrent: it has a state, not a cache of keys and values"


def layer_kinds(model: PreTrainedModel) -> list[LayerKind]:
    """What each layer caches.

    Raises:
        UnsupportedModel: no layer of the model caches the keys and values of causal attention, or one caches more.
    """
    config = model.config.get_text_config(decoder=True)
    reason = _reason_against(model, config)
    if reason is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} {reason}; use a decoder-only model with standard attention (Llama, Mistral, "
            "Qwen2, Qwen3, SmolLM, Phi-3, Granite, OLMo...)"
        )
    kinds = [_kind(config, *layer) for layer in zip(*get_layer_types_and_kwargs(config), strict=True)]
    return [
        kind._replace(has_latents=kind.has_keys and has_latents(model), num_readers=readers)
        for kind, readers in zip(kinds, num_readers(config), strict=True)
    ]


def _kind(config: PreTrainedConfig, name: str, options: dict[str, Any]) -> LayerKind:
    """What a layer caches.

    A window that is as long as the model's positions hides no token: such a layer is one of full attention. One of
    chunks caches as many tokens as a chunk has.

    Args:
        name: of the kind, as transformers has it.
        options: of the layer's cache in transformers.
    """
    window: int | None = options.get("sliding_window")
    if name == "sliding_attention" and window is not None and window >= config.max_position_embeddings:
        window = None
    return LayerKind(
        has_keys=name not in WITHOUT_KEYS, window=window, num_states=int(options.get("number_of_states", 0))
    )


def window(model: PreTrainedModel, window_tokens: int | None) -> int:
    """The context window: `window_tokens`, or all positions that the model was trained on.

    Raises:
        InvalidInput: the model was trained on fewer.
    """
    most: int = model.config.get_text_config(decoder=True).max_position_embeddings
    if window_tokens is not None and not 1 <= window_tokens <= most:
        raise InvalidInput(
            f"window_tokens is {window_tokens}: {type(model).__name__} was trained on {most:,} positions"
        )
    return window_tokens or most


def _reason_against(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder model"
    if not hasattr(config, "num_attention_heads"):
        return "is made of several models, and none is its decoder of text" if config.sub_configs else RECURRENT
    if getattr(config, "alibi", False) or any(hasattr(model.base_model, name) for name in MAKE_ALIBI):
        return (
            "adds a bias for each token's distance to its scores (ALiBi): slots stand for tokens at many distances, "
            "and its layers take no other attention function"
        )
    if not hasattr(config, "max_position_embeddings"):
        return "does not say for how many positions it was trained (max_position_embeddings)"
    names, options = get_layer_types_and_kwargs(config)
    if strange := set(names) - KNOWN_KINDS:
        return f"has layers of kind {', '.join(sorted(strange))}"
    if set(names) == {"dummy"}:
        return "has no keys and values of its own: it reads those of another model"
    if WITHOUT_KEYS.issuperset(names):
        return RECURRENT
    if not any(_kind(config, *layer).is_compactable for layer in zip(names, options, strict=True)):
        return (
            f"has only layers that see a window or a chunk of its {config.max_position_embeddings:,} positions: its "
            "cache is bounded already"
        )
    return None


def cache_argument(model: PreTrainedModel) -> str:
    """The name of the model's cache argument: `cache`, or `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def probe(model: PreTrainedModel, cache: KVCache) -> None:
    """Compare the logits of a few tokens with transformers' attention and with ours; the model keeps ours.

    Args:
        cache: a new one, for the probe.

    Raises:
        UnsupportedModel: the logits differ, or the model does not go through the attention interface.
    """
    before = attention_setting(model)
    try:
        with refusing(model):
            _require_same_logits(model, cache)
    except BaseException:
        model.set_attn_implementation(before)
        raise


@contextmanager
def refusing(model: PreTrainedModel, what: str = "cannot run with a compacting cache") -> Iterator[None]:
    """A trial: any error within the model means that it is not supported.

    Args:
        what: the model cannot do.

    Raises:
        UnsupportedModel: the trial failed; the message names the model, the kinds of its layers and the error.
    """
    try:
        yield
    except (UnsupportedModel, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kinds = sorted(set(get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]))
        raise UnsupportedModel(
            f"{type(model).__name__}, with layers of {' and '.join(kinds)}, {what}: {error or type(error).__name__}; "
            "use a decoder-only model with standard attention"
        ) from error


def _require_same_logits(model: PreTrainedModel, cache: KVCache) -> None:
    error = logits_error(model, cache)
    if error is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} computes other logits with a compacting cache (relative error {error:.2g}); "
            "its attention is not the standard one: use another model"
        )


def logits_error(model: PreTrainedModel, cache: KVCache) -> float | None:
    """Run a few tokens with transformers' attention and with ours; the model keeps ours.

    Args:
        cache: a new one, for the trial.

    Returns:
        The RMS error of the logits relative to their standard deviation; None if it is not above rounding.

    Raises:
        UnsupportedModel: tokens attend to later tokens, or transformers' own cache gives other logits as well.
    """
    error, rounding, foresight = _probe_errors(model, cache)
    tolerance = LOGITS_TOLERANCE.get(model.dtype, 1e-3)
    if foresight > tolerance:
        raise UnsupportedModel(
            f"{type(model).__name__} does not attend causally: what it says of a token changes with the tokens after "
            f"it (by {foresight:.2g} of its spread); load it as a decoder (is_decoder=True in its configuration), or "
            "use a decoder-only model"
        )
    most = MAX_ROUNDING.get(model.dtype, 1e-2)
    if error > most and rounding > most:
        raise UnsupportedModel(
            f"{type(model).__name__} disagrees with itself in this version of transformers: with the cache of "
            f"transformers its logits are off by {rounding:.2g} of their spread; use a model whose logits agree"
        )
    allowed = max(tolerance, min(3 * rounding, most))
    return None if error <= allowed else error


def _probe_errors(model: PreTrainedModel, cache: KVCache) -> tuple[float, float, float]:
    """Relative RMS errors of logits that are read in three steps, against those of one pass.

    Returns:
        The error with our cache, in which the first step's tokens become exact slots; the error with transformers' own
        cache and attention, which is rounding; and the change of the first half's logits if other tokens follow.
    """
    ids = probe_ids(model)[None]
    set_attention(model, "sdpa" if model._supports_sdpa else "eager")
    with refusing(model, "cannot read text alone, in transformers itself"):
        expected = model(ids, use_cache=False).logits[0].float()
    half = PROBE_TOKENS // 2
    others = torch.cat([ids[:, :half], ids[:, :half].flip(1)], dim=1)
    with_others = model(others, use_cache=False).logits[0, :half].float()
    argument = cache_argument(model)
    with refusing(model, "cannot go on from a cache of text, in transformers itself"):
        stock_cache = DynamicCache(config=model.config)
        stock = [model(ids[:, start:end], **{argument: stock_cache}).logits[0].float() for start, end in PROBE_STEPS]
    set_attention(model, ATTENTION_NAME)
    ours, told = [], list[CompactableLayer]()
    for layer in cache.compactable:
        layer.query_sink = partial(_tell, told, layer)
    for start, end in PROBE_STEPS:
        ours.append(model(ids[:, start:end], **{argument: cache}).logits[0].float())
        if start == 0:
            _require_use(model, cache, told)
            slots = [Slots.exact(*layer.exact_entries(2, 3), start=2) for layer in cache.compactable]
            cache.restore(cache.compacted([Segment(2, 3, 0)], slots, num_pinned=2))
    return (
        relative_rms(torch.cat(ours), expected),
        relative_rms(torch.cat(stock), expected),
        relative_rms(with_others, expected[:half]),
    )


def _tell(told: list[CompactableLayer], layer: CompactableLayer, *queries: Tensor) -> None:
    told.append(layer)


def _require_use(model: PreTrainedModel, cache: KVCache, told: Sequence[CompactableLayer]) -> None:
    """Raise UnsupportedModel if a pass has not gone through our attention in every layer.

    Args:
        told: the layers whose queries were handed out, which happens once if as many layers read them as we think.
    """
    if any(layer.scaling is None for layer in cache.compactable):
        raise UnsupportedModel(
            f"{type(model).__name__} does not take another attention function; use a model whose attention is looked "
            "up in transformers' AttentionInterface"
        )
    if any(layer.waiting or sum(each is layer for each in told) != 1 for layer in cache.compactable):
        raise UnsupportedModel(
            f"{type(model).__name__} does not read its keys as often as its configuration says: its attention is "
            "not the standard one; use another model"
        )


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Tokens from all of the vocabulary: the first ones are often special, and suffer most from rounding."""
    vocab_size: int = model.config.get_text_config().vocab_size
    return torch.arange(1, 1 + PROBE_TOKENS, device=model.device) * vocab_size // (PROBE_TOKENS + 1)


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS error, relative to the standard deviation of the expected values."""
    return float((actual - expected).square().mean().sqrt() / expected.std().clamp_min(1e-12))
