"""Forward passes that somebody else drives: `generate()` of transformers, or whoever calls the model.

A watched cache has to see what is about to be read into it, before it is read, and may read the beginning of a long
prompt itself. Whoever drives gets the pass that was asked for all the same, or an error before anything is read. Knows
no policy and no compaction.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from am_memory.engines.transformers.attention import NO_MASK
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import KVCache

CACHE_NAMES = ("cache", "past_key_values")
"""What `forward` calls its cache: the second became the first within transformers 5, and is still taken."""
FOR_EACH_TOKEN = ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids")
"""What `forward` takes beside the token ids that has an entry for each of them."""
OF_ALL_TOKENS = ("labels", "shift_labels", "output_hidden_states", "output_attentions", "output_router_logits")
"""What makes a pass give more than logits, of all of its tokens at once."""
NOT_TEXT = ("pixel_values", "image_", "images", "video_", "videos", "audio_", "input_audio", "input_features")
"""How the names begin of what a model of several media takes beside text."""

Arguments = dict[str, Any]


class InPlaceOf:
    """What stands in place of a model's method; in a copy of the model, the method itself does.

    Args:
        method: of the model, or what stands there already.
        instead: what is called.
    """

    def __init__(self, method: Callable[..., Any], instead: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method, updated=())  # all but its attributes, which may be one of this class's
        self._method, self._instead = method, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._instead(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._method, memo)


def watch(model: PreTrainedModel, forward: Callable[..., Any], require: Callable[[KVCache], None]) -> None:
    """Have watched caches see what is about to be read into them; other passes are as they were.

    It is no hook of the model: wrappers (peft's) may call `forward` by itself.

    Args:
        model: to be watched; a copy of it is not.
        forward: what makes a pass: the model's own, or a shortcut to it.
        require: called with every cache of ours that a pass reads into, watched or not; raises what is against it.
    """
    model.forward = InPlaceOf(model.forward, WatchedForward(model, forward, require))
    generating: Any = model
    prepare: Callable[..., Any] = generating.prepare_inputs_for_generation
    if type(generating).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:

        def prepare_with_cache(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Phi-3 gives up its cache where it would turn keys in another way, which ours never does."""
            inputs = prepare(input_ids, *args, **kwargs)
            cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
            if not isinstance(cache, KVCache) or any(value is cache for value in inputs.values()):
                return inputs
            return GenerationMixin.prepare_inputs_for_generation(generating, input_ids, *args, **kwargs)

        generating.prepare_inputs_for_generation = InPlaceOf(prepare, prepare_with_cache)


class WatchedForward:
    """A model's `forward`, with what `watch` has to do before and after a pass."""

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
        if cache.before_forward is None:
            return self._forward(*args, **kwargs)
        return self._watched(cache, asked)

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
            return self._forward(**asked)
        output = self._forward(**_rest(asked, num_read))
        return _with_logits(output, logits) if logits else output

    def _reason_for_one_pass(self, asked: Arguments) -> str:
        """What the pass is asked for that it gives only if it reads everything by itself; "" for none."""
        defaults = self._model.config

        def is_asked_for(name: str) -> bool:
            value = asked.get(name)
            if value is None and name.startswith("output_"):
                value = getattr(defaults, name, None)
            return value is not None and value is not False

        return next((name for name in OF_ALL_TOKENS if is_asked_for(name)), "")


def _one_text(asked: Arguments) -> Tensor:
    """The token ids of the one text without padding, (1, num_tokens), that a pass is to read.

    Raises:
        UnsupportedOperation: it is to read something else.
    """
    if media := next((name for name in asked if name.startswith(NOT_TEXT) and asked[name] is not None), None):
        raise UnsupportedOperation(f"a compacting cache holds text alone: leave out {media}")
    input_ids: Tensor | None = asked.get("input_ids")
    if input_ids is None:
        raise UnsupportedOperation("a compacting cache has to see token ids: pass input_ids, not inputs_embeds")
    if input_ids.shape[0] != 1:
        raise UnsupportedOperation(
            f"a batch of {input_ids.shape[0]} sequences (or beams); a cache holds one: use one cache for each"
        )
    mask: Tensor | None = asked.get("attention_mask")
    if mask is not None and not mask.all():
        raise UnsupportedOperation(NO_MASK)
    return input_ids


def _wanted(asked: Arguments, num_tokens: int) -> tuple[int, int]:
    """For how many of the last tokens logits are wanted, and how many of these in one pass, if need be.

    A number of logits is what assisted decoding asks for: it takes back what it finds wrong, so that none of these
    tokens may be compacted before it has seen all of them. All logits can come from several passes.
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
    """The output of a pass, a tuple or not, with the logits of the tokens that were read before it."""
    last: Tensor = output[0]
    logits = torch.cat([*(part[None].to(last) for part in first), last], dim=1)
    if isinstance(output, tuple):
        return (logits, *output[1:])
    output.logits = logits
    return output
