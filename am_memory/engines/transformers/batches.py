"""One forward pass for several caches, each of which reads one token: weights are loaded once for all of them.

On a CPU, and so far on a GPU too, attention runs cache by cache. Knows no policy and no compaction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from am_memory.engines.transformers import support
from am_memory.kv_cache.batch import BatchCache
from am_memory.kv_cache.cache import KVCache

Step = Callable[[Tensor, Tensor, Cache], Tensor]
"""Reads token ids (num_caches, 1) at positions (num_caches, 1); returns logits (num_caches, vocab_size) float32."""
FIRST_TOKENS = (3, 5)
"""Tokens that the caches of the trial hold: their positions differ."""

logger = logging.getLogger("am_memory")


class Batches:
    """Reads tokens into several caches of a model at once, after a trial.

    Args:
        step: one forward pass.
        new_cache: makes an empty cache of the model.
    """

    def __init__(self, model: PreTrainedModel, step: Step, new_cache: Callable[[], KVCache]) -> None:
        self._model, self._step, self._new_cache = model, step, new_cache

    def read(self, caches: Sequence[KVCache], token_ids: Sequence[int]) -> Tensor:
        """Read token i into cache i; returns logits, (num_caches, vocab_size) float32."""
        batch = BatchCache(caches)
        positions = torch.tensor([cache.num_tokens for cache in caches], device=self._model.device)
        logits = self._step(torch.tensor(token_ids)[:, None], positions[:, None], batch)
        batch.hand_back()
        return logits

    @cached_property
    def are_possible(self) -> bool:
        """Whether a batch computes what each cache computes alone; measured once, on a few tokens."""
        config = self._model.config.get_text_config(decoder=True)
        if "chunked_attention" in get_layer_types_and_kwargs(config)[0]:  # a token there sees its own chunk alone
            return False
        try:
            error = self._error()
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # of any kind: the model does not take a batch
            logger.warning("%s reads sessions one by one: %s", type(self._model).__name__, raised)
            return False
        if error > support.LOGITS_TOLERANCE.get(self._model.dtype, 1e-3):
            logger.warning("%s reads sessions one by one: a batch is off by %.2g", type(self._model).__name__, error)
            return False
        return True

    def _error(self) -> float:
        """The RMS error of a batch's logits, relative to their standard deviation."""
        ids, caches = support.probe_ids(self._model), []
        for num_tokens in FIRST_TOKENS:
            cache = self._new_cache()
            for position, token_id in enumerate(ids[:num_tokens]):
                self._step(token_id[None, None], position + torch.zeros_like(token_id)[None, None], cache)
            caches.append(cache)
        next_ids = ids[-len(caches) :]
        alone = [
            self._step(token_id[None, None], torch.full_like(token_id, cache.num_tokens)[None, None], cache.fork())
            for token_id, cache in zip(next_ids, caches, strict=True)
        ]
        return support.relative_rms(self.read(caches, next_ids.tolist()), torch.cat(alone))
