"""Models with a table of positions, which limits the number of tokens.

Reading past the end of the table raises an IndexError inside the model; on a GPU the process can no longer use the
device. So the table is found without reaching its end: by the lookups of a few tokens, read one after the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel

from am_memory.engines.transformers.in_place import InPlaceOf
from am_memory.engines.transformers.support import cache_argument
from am_memory.errors import PromptTooLong
from am_memory.kv_cache.cache import KVCache

NUM_STEPS = 3
aten = torch.ops.aten


@torch.no_grad()
def num_positions(model: PreTrainedModel, cache: KVCache) -> int | None:
    """The most tokens that the model can read; None if there is no limit.

    Args:
        cache: a new one, for the trial.
    """
    config = model.config.get_text_config(decoder=True)
    ids = torch.tensor([[config.vocab_size // 2]], device=model.device)
    found: set[tuple[int, int]] | None = None
    for step in range(NUM_STEPS):
        with _Lookups() as lookups:
            model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        here = {(size, index - step) for size, index in lookups.seen if size >= config.max_position_embeddings}
        found = here if found is None else found & here
    return min((size - offset for size, offset in found or ()), default=None)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records lookups in tables: the number of rows, and the highest index."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for size, index in _looked_up(func, args):
            if index.numel() and not index.dtype.is_floating_point and index.dtype != torch.bool:
                self.seen.add((size, int(index.max())))
        return func(*args, **(kwargs or {}))


def _looked_up(func: Any, args: Any) -> Iterator[tuple[int, Tensor]]:
    if func is aten.embedding.default:
        yield args[0].shape[0], args[1]
    elif func is aten.gather.default or func is aten.index_select.default:
        yield args[0].shape[args[1]], args[2]
    elif func is aten.index.Tensor:
        yield from ((args[0].shape[place], index) for place, index in enumerate(args[1]) if index is not None)


def refusal(name: str, num_tokens: int, max_tokens: int) -> PromptTooLong:
    """The error for more tokens than the model has positions."""
    return PromptTooLong(
        f"{num_tokens:,} tokens are more than the {max_tokens:,} for which {name} has positions: rewind, begin a new "
        f"session, or use a model with RoPE. A compaction reads its block once more, behind all that there is: set "
        f"trigger_tokens to {max_tokens}, and none is ever due"
    )


def refuse_too_long_answers(model: PreTrainedModel, max_tokens: int) -> None:
    """Have `generate()` of transformers raise at the start if an answer may exceed the positions of the model.

    Otherwise it would raise at the last position, and the caller would lose what was generated so far.
    """
    prepare: Callable[..., Any] | None = getattr(model, "_prepare_cache_for_generation", None)
    if prepare is None:  # each pass is checked in any case
        return
    parameters = inspect.signature(prepare)

    def prepare_if_it_fits(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        config, inputs = given.get("generation_config"), given.get("model_kwargs") or {}
        is_ours = any(isinstance(value, KVCache) and value.before_forward is not None for value in inputs.values())
        if is_ours and isinstance(config, GenerationConfig) and (config.max_length or 0) - 1 > max_tokens:
            raise PromptTooLong(
                f"generate() may come to {config.max_length:,} tokens here, and {type(model).__name__} has positions "
                f"for {max_tokens:,}: lower max_new_tokens by {config.max_length - 1 - max_tokens:,} or more"
            )
        return prepare(*args, **kwargs)

    generating: Any = model
    generating._prepare_cache_for_generation = InPlaceOf(prepare, prepare_if_it_fits)
