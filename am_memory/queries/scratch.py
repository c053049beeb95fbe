"""Reading on scratch: forward passes that leave nothing in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from am_memory.engines.base import Engine, SessionCache, SessionLayer, in_chunks

Passes = list[tuple[Tensor, Tensor]]
"""One pair (query, log_mass) for each forward pass, as `OnQuery` gets them from one layer."""


class scratch:
    """Put a cache back as it was: `with scratch(cache):` may read and compact, and nothing of it remains.

    A class and no generator: Python would close an interrupted generator at some later time, and that would put the
    cache back over whatever was read since.

    Args:
        back_to: begin as the cache was with its first `back_to` tokens; those behind must be exact.
    """

    def __init__(self, cache: SessionCache, back_to: int | None = None) -> None:
        self._cache, self._before = cache, cache.state()
        self._behind = (cache.num_tokens if back_to is None else back_to, cache.num_tokens)
        # What is read in place of these tokens is written over their entries, which the state only refers to.
        self._kept = [[entries.clone() for entries in self._entries(layer)] for layer in cache.compactable]

    def _entries(self, layer: SessionLayer) -> tuple[Tensor, ...]:
        """Views of the entries of the tokens that are taken back."""
        start, end = self._behind
        return layer.exact_entries(start, end) if end > start else ()

    def __enter__(self) -> None:
        if self._kept[0]:
            self._cache.truncate(self._behind[0])

    def __exit__(self, *error: object) -> None:
        try:
            self._put_back()
        finally:  # once more, in case an interrupt stopped the first time
            self._put_back()

    def _put_back(self) -> None:
        self._cache.restore(self._before)
        for layer, kept in zip(self._cache.compactable, self._kept, strict=True):
            for entries, before in zip(self._entries(layer), kept, strict=True):
                entries.copy_(before)


def require_scaling(engine: Engine, cache: SessionCache, token_id: int) -> None:
    """See to it that the layers know the scale of their softmax, which a cache that was just loaded does not.

    Args:
        cache: restored afterwards, whatever happens.
        token_id: read on scratch if necessary; any token will do.
    """
    if any(layer.scaling is None for layer in cache.compactable):
        with scratch(cache):
            engine.forward(cache, [token_id])


def logits_on_scratch(engine: Engine, cache: SessionCache, token_ids: Sequence[int], chunk_tokens: int) -> Tensor:
    """Read tokens behind what the cache holds, and take the logits of each, (len(token_ids), vocab_size) float32.

    Args:
        cache: restored afterwards, whatever happens.
        chunk_tokens: tokens in one forward pass.
    """
    with scratch(cache):
        chunks = in_chunks(token_ids, chunk_tokens)
        return torch.cat([engine.forward(cache, chunk, num_logits=len(chunk)) for chunk in chunks])


def queries_on_scratch(
    engine: Engine,
    cache: SessionCache,
    chunks: Iterable[Sequence[int]],
    on_read: Callable[[int], None] = lambda num_tokens: None,
) -> list[Passes]:
    """Read tokens behind what the cache holds, one forward pass for each chunk, and take their queries.

    Args:
        cache: restored afterwards, whatever happens.
        on_read: called after each chunk with the number of tokens read so far.

    Returns:
        For each compactable layer its queries, pass by pass.
    """
    passes: list[Passes] = [[] for _ in cache.compactable]
    num_tokens = 0
    with scratch(cache):
        for chunk in chunks:
            engine.forward(
                cache, chunk, on_query=lambda index, query, log_mass: passes[index].append((query, log_mass))
            )
            num_tokens += len(chunk)
            on_read(num_tokens)
    return passes
