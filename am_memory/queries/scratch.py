"""Reading on scratch: forward passes that leave nothing in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from am_memory.engines.base import Engine, SessionCache

Passes = list[tuple[Tensor, Tensor]]
"""One pair (query, log_mass) for each forward pass, as `OnQuery` gets them from one layer."""


class scratch:
    """Put a cache back as it was: `with scratch(cache):` may read and compact, and nothing of it remains.

    A class and no generator: Python would close an interrupted generator at some later time, and that would put the
    cache back over whatever was read since.
    """

    def __init__(self, cache: SessionCache) -> None:
        self._cache, self._before = cache, cache.state()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._cache.restore(self._before)


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
