"""The queries of tokens that are read for their queries alone, and leave nothing in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from am_memory.engines.base import Engine, SessionCache

Passes = list[tuple[Tensor, Tensor]]
"""What `OnQuery` got at one layer, pass by pass: the queries, and the log of what each spent on everything."""


def queries_on_scratch(
    engine: Engine,
    cache: SessionCache,
    chunks: Iterable[Sequence[int]],
    on_read: Callable[[int], None] = lambda num_tokens: None,
) -> list[Passes]:
    """Read tokens behind what the cache holds, a forward pass for each chunk, and take their queries.

    Args:
        cache: it is afterwards as it was, whatever happens.
        on_read: called with the number of tokens read so far, after each chunk.

    Returns:
        For each compactable layer what passed it.
    """
    passes: list[Passes] = [[] for _ in cache.compactable]
    state, num_tokens = cache.state(), 0
    try:
        for chunk in chunks:
            engine.forward(
                cache, chunk, on_query=lambda index, query, log_mass: passes[index].append((query, log_mass))
            )
            num_tokens += len(chunk)
            on_read(num_tokens)
    finally:
        cache.restore(state)
    return passes
