"""Forward passes that the engine does not start: those of `generate()` of transformers, and of callers of the model.

A watched cache sees every pass before it runs, and may read the first tokens of a long prompt itself. The caller still
gets the output that it asked for, or an error before anything is read. Knows no policy and no compaction.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from am_memory.engines.transformers.attention import NO_MASK
from am_memory.engines.transformers.in_place import InPlaceOf
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import KVCache

CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache argument of `forward`: transformers 5.24 renamed the second to the first, and takes both."""
FOR_EACH_TOKEN = ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids")
"""Arguments of `forward` that have an entry for each token."""
OF_ALL_TOKENS = ("labels", "shift_labels", "output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments that ask for more than logits, for all tokens of the pass at once."""
MEDIA_PREFIXES = ("pixel_values", "image_", "images", "video_", "videos", "audio_", "input_audio", "input_features")
"""Prefixes of the arguments for images, video and audio."""

Arguments = dict[str, Any]


def watch(model: PreTrainedModel, forward: Callable[..., Any], require: Callable[[KVCache], None]) -> None:
    """Call `before_forward` of watched caches before each pass; passes with other caches are unchanged.

    A forward hook of torch would not do: wrappers (peft's) may call `forward` directly.

    Args:
        model: is watched; copies of it are not.
        forward: runs a pass: the model's own, or a shortcut to it.
        require: called with every `KVCache` that a pass reads into, watched or not; raises if it must not be read into.
    """
    model.forward = InPlaceOf(model.forward, WatchedForward(model, forward, require))
    generating: Any = model
    prepare: Callable[..., Any] = generating.prepare_inputs_for_generation
    if type(generating).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:

        def prepare_with_cache(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Phi-3 drops its cache at the length at which its RoPE changes. A `KVCache` holds the RoPE fixed."""
            inputs = prepare(input_ids, *args, **kwargs)
            cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
            if not isinstance(cache, KVCache) or any(value is cache for value in inputs.values()):
                return inputs
            return GenerationMixin.prepare_inputs_for_generation(generating, input_ids, *args, **kwargs)

        generating.prepare_inputs_for_generation = InPlaceOf(prepare, prepare_with_cache)


class WatchedForward:
    """A model's `forward`, with the work of `watch` before and after each pass."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], require: Callable[[KVCache], None]) -> None:
        self._model, self._forward, self._require = model, forward, require
        self._names = list(inspect.signature(forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        cache = next((asked[name] for name in CACHE_NAMES if asked.get(name) is not None), None)
        if not isinstance(cache, KVCache):
            return self._forward(*args, **kwargs)
        self._require(cache)
        if asked.get("use_cache") is False:
            raise UnsupportedOperation(
                "use_cache=False has the whole text read again for each token, and each time this cache would hold it "
                "once more: leave use_cache out, or give no cache"
            )
        mask = asked.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
            raise UnsupportedOperation(NO_MASK)
        if cache.before_forward is None:
            return self._forward(*args, **kwargs)
        return self._watched(cache, asked)

    def _read(self, cache: KVCache, asked: Arguments) -> Any:
        """Run a pass. One that fails leaves nothing: a recurrent state does not show that it has seen a token."""
        before = cache.state()
        try:
            return self._forward(**asked)
        except BaseException:
            try:
                cache.restore(before)
            finally:  # once more, in case an interrupt stopped the first time
                cache.restore(before)
            raise

    def _watched(self, cache: KVCache, asked: Arguments) -> Any:
        assert cache.before_forward is not None
        input_ids = _one_text(asked)
        num_tokens = input_ids.shape[1]
        num_logits, at_once, reason = 1, 1, ""
        if num_tokens > 1:
            num_logits, at_once = _wanted(asked, num_tokens)
            if reason := self._reason_for_one_pass(asked):
                at_once = num_tokens
        num_read, logits = cache.before_forward(input_ids[0].tolist(), num_logits, at_once, reason)
        if num_read == 0:
            return self._read(cache, asked)
        output = self._read(cache, _rest(asked, num_read))
        return _with_logits(output, logits) if logits else output

    def _reason_for_one_pass(self, asked: Arguments) -> str:
        """The wanted output that only a pass over all tokens can give; "" if there is none."""
        defaults = self._model.config

        def is_asked_for(name: str) -> bool:
            value = asked.get(name)
            if value is None and name.startswith("output_"):
                value = getattr(defaults, name, None)
            return value is not None and value is not False

        return next((name for name in OF_ALL_TOKENS if is_asked_for(name)), "")


def _one_text(asked: Arguments) -> Tensor:
    """The token ids of a pass, (1, num_tokens), which must be one text.

    Raises:
        UnsupportedOperation: the input is something else.
    """
    if media := next((name for name in asked if name.startswith(MEDIA_PREFIXES) and asked[name] is not None), None):
        raise UnsupportedOperation(f"a compacting cache holds text alone: leave out {media}")
    input_ids: Tensor | None = asked.get("input_ids")
    if input_ids is None:
        raise UnsupportedOperation("a compacting cache has to see token ids: pass input_ids, not inputs_embeds")
    if input_ids.shape[0] != 1:
        raise UnsupportedOperation(
            f"a batch of {input_ids.shape[0]} sequences (or beams); a cache holds one: use one cache for each, or "
            "Memory.generate_many, which takes sessions and forks of one session"
        )
    return input_ids


def _wanted(asked: Arguments, num_tokens: int) -> tuple[int, int]:
    """How many of the last tokens need logits, and how many of these must be read in one pass.

    Assisted decoding asks for a number of logits. It drops wrong tokens afterwards, so none of them may be compacted
    before it has checked all. A caller that asks for all logits can get them from several passes.
    """
    keep: int | Tensor = asked.get("logits_to_keep", 0)
    if isinstance(keep, Tensor):
        positions = torch.where(keep < 0, keep + num_tokens, keep)
        keep = num_tokens - int(positions.min())
    elif keep == 0:
        return num_tokens, 1
    return min(keep, num_tokens), min(keep, num_tokens)


def _rest(asked: Arguments, num_read: int) -> Arguments:
    """The same pass without its first tokens."""
    rest = {**asked, "input_ids": asked["input_ids"][:, num_read:]}
    for name in FOR_EACH_TOKEN:
        if rest.get(name) is not None:
            rest[name] = rest[name][..., num_read:]
    keep = rest.get("logits_to_keep")
    if isinstance(keep, Tensor):
        rest["logits_to_keep"] = torch.where(keep < 0, keep, keep - num_read)
    return rest


def _with_logits(output: Any, first: list[Tensor]) -> Any:
    """The output of a pass, with the logits of the tokens that were read before it in front."""
    last: Tensor = output[0]
    logits = torch.cat([*(part[None].to(last) for part in first), last], dim=1)
    if isinstance(output, tuple):
        return (logits, *output[1:])
    output.logits = logits
    return output
