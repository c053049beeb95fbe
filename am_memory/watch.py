"""Watching somebody else drive the model: `generate()` of transformers reads into a context's cache, which compacts.

Owns what a context has to learn from the passes of others: which tokens they read, and what they left behind when they
were interrupted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

from am_memory.cache import KVCache
from am_memory.context import Context
from am_memory.events import ReadProgress


def watched(context: Context) -> KVCache:
    """A context's cache, for the forward passes of others, which takes in what they read and makes room for it.

    The cache keeps its context alive, and not the other way round: a cycle would be freed only when Python's collector
    comes by, long after whoever used it.

    Args:
        context: nobody else's from now on.

    Raises:
        UnsupportedOperation: the engine's cache is not one of transformers.
    """
    cache = context.transformers_cache
    context.cache = weakref.proxy(cache)
    cache.before_forward = _Watch(context).before_forward
    return cache


class _Watch:
    """Stands between a cache and the context that it is of.

    Args:
        context: it knows the cache, and does not own it.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.cache = context.transformers_cache
        self._whole = self.cache.state()  # to go back to, should a pass be interrupted

    def before_forward(self, token_ids: Sequence[int]) -> int:
        """Take in tokens that a forward pass is about to read; read the first ones if all are too many.

        Returns:
            How many of `token_ids` are read already; the last ones are left to the forward pass.
        """
        self._settle()
        context, cache = self.context, self.cache
        with context.transaction():
            context.check(token_ids)
            context.tokens.extend(token_ids)
            start, end = cache.num_tokens, len(context.tokens)
            while (room := context.make_room(end - cache.num_tokens)) < end - cache.num_tokens:
                context.forward(context.tokens[cache.num_tokens :][: min(room, context.chunk_tokens)])
                context.notify(ReadProgress(context.name, cache.num_tokens - start, end - start))
        context.watch_window(end - cache.num_tokens)
        if context.live is not None:
            for index, layer in enumerate(cache.compactable):
                layer.query_sink = partial(context.live.add, index)
        self._whole = cache.state()
        return cache.num_tokens - start

    def _settle(self) -> None:
        """Drop what an interrupted pass left behind, or what its owner has taken back (`crop`)."""
        if not self.cache.is_whole:
            self.cache.restore(self._whole)
        if self.cache.num_tokens != len(self.context.tokens):
            with self.context.transaction():
                self.context.tokens = self.context.tokens[: self.cache.num_tokens]
                self.context.went_back()
