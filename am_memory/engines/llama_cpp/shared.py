"""Reads tokens into caches whose heads share every cell of llama.cpp. Knows no session and no compaction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from am_memory.engines.base import Capabilities, OnQuery, SessionCache
from am_memory.engines.llama_cpp.cache import CellCache
from am_memory.engines.llama_cpp.capture import Attention
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.errors import InvalidInput


class SharedReader:
    """Reads tokens into `CellCache`s; llama.cpp keeps the keys and values, and computes the attention.

    Args:
        model: the tested model.
    """

    capabilities = Capabilities(can_rotate_keys=True)

    def __init__(self, model: CellModel) -> None:
        self._model = model

    def new_cache(self) -> CellCache:
        """An empty cache."""
        return CellCache(self._model)

    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> None:
        """There are none: the one context holds one text."""

    def read(self, cache: SessionCache, token_ids: Sequence[int], num_logits: int, on_query: OnQuery | None) -> Tensor:
        """Read tokens; see `Engine.forward`."""
        if not isinstance(cache, CellCache):
            raise InvalidInput(f"a {type(cache).__name__} is another engine's cache: make one with new_cache()")
        if on_query is None:
            return cache.read(token_ids, num_logits, None)
        passes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._model.layers]

        def take(layer: int, attention: Attention) -> None:
            passes[layer].append((attention.grouped_query, attention.log_mass()))

        logits = cache.read(token_ids, num_logits, take)
        for layer, parts in enumerate(passes):
            query, log_mass = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
            on_query(layer, query, log_mass)
        return logits
