"""Watching somebody else drive the model: `generate()` of transformers reads into a context's cache, which compacts.

Owns what a context has to learn from the passes of others: which tokens they read, and what they left behind when they
were interrupted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor

from am_memory.errors import UnsupportedOperation
from am_memory.events import ReadProgress
from am_memory.kv_cache.cache import KVCache
from am_memory.session.context import Context
from am_memory.session.limits import require_positions, require_token_ids


def watched(context: Context) -> KVCache:
    """A context's cache, for the forward passes of others, which takes in what they read and makes room for it.

    The cache keeps its context alive, and not the other way round: a cycle would be freed only when Python's collector
    comes by, long after whoever used it.

    Args:
        context: nobody else's from now on.

    Raises:
        UnsupportedOperation: the engine's cache is not one of transformers.
    """
    if not context.engine.capabilities.runs_in_generate:
        raise UnsupportedOperation(
            f"a {type(context.cache).__name__} cannot go into generate() of transformers: use a session, or "
            "engine='transformers'"
        )
    cache = cast("KVCache", context.cache)
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
        self.cache = cast("KVCache", context.cache)
        self._whole = self.cache.state()  # to go back to, should a pass be interrupted

    def before_forward(
        self, token_ids: Sequence[int], num_logits: int, at_once: int, what_for: str
    ) -> tuple[int, list[Tensor]]:
        """Take in tokens that a forward pass is about to read; read the first ones if all are too many.

        Args:
            num_logits: of so many of the last ones logits are wanted.
            at_once: so many of the last ones have to be read by one pass.
            what_for: this is asked for beside the logits; "" for nothing.

        Returns:
            How many of `token_ids` are read already, the last ones being left to the forward pass; and the logits of
            those among them for which they are wanted, pass by pass.

        Raises:
            UnsupportedOperation: no compaction makes room for so many at once.
        """
        self._settle()
        context, cache = self.context, self.cache
        logits: list[Tensor] = []
        with context.transaction():
            info = context.engine.info
            require_token_ids(info, token_ids)
            require_positions(info, cache.num_tokens + len(token_ids))
            context.tokens.extend(token_ids)
            start, end = cache.num_tokens, len(context.tokens)
            if at_once > 1:
                self._require_room(len(token_ids), at_once, what_for)
            while not self._have_room_for(left := end - cache.num_tokens, at_once):
                first = cache.num_tokens
                piece = context.tokens[first : first + min(context.room_tokens, context.chunk_tokens, left - at_once)]
                num_wanted = max(first + len(piece) - (end - num_logits), 0)
                piece_logits = context.forward(piece, num_logits=min(num_wanted, len(piece)))
                if num_wanted:
                    logits.append(piece_logits)
                context.notify(ReadProgress(context.name, cache.num_tokens - start, end - start))
        context.notify_beyond_window(end - cache.num_tokens)
        if context.live is not None:
            for index, layer in enumerate(cache.compactable):
                layer.query_sink = partial(context.live.add, index)
        self._whole, cache.num_announced = cache.state(), end
        return cache.num_tokens - start, logits

    def _have_room_for(self, num_tokens: int, at_once: int) -> bool:
        """Compact until so many of the tokens fit, and tell whether all of them do."""
        self.context.compact_if_due(min(num_tokens, at_once))
        return num_tokens <= self.context.room_tokens

    def _require_room(self, num_tokens: int, at_once: int, what_for: str) -> None:
        """Raise UnsupportedOperation where some of the tokens have to be read together and no compaction helps."""
        if self.cache.kv_tokens + num_tokens <= self.context.start_tokens:
            return
        most = self.context.most_at_once
        if at_once <= most:
            return
        if what_for:
            raise UnsupportedOperation(
                f"a pass with {what_for} reads its {at_once} tokens at once, and no more than {most} are sure to fit "
                f"below the trigger of {self.context.trigger_tokens}: leave it out, read less at once, or raise "
                "trigger_tokens"
            )
        raise UnsupportedOperation(
            f"the logits of {at_once} tokens at once are more than the {most} that are sure to fit below the trigger "
            f"of {self.context.trigger_tokens}: let assisted decoding propose fewer (prompt_lookup_num_tokens, "
            "num_assistant_tokens), ask for all logits (logits_to_keep=0), or raise trigger_tokens"
        )

    def _settle(self) -> None:
        """Drop what an interrupted pass left behind, or what its owner has taken back (`crop`)."""
        if not self.cache.is_whole:
            self.cache.restore(self._whole)
        if self.cache.num_tokens != len(self.context.tokens):
            with self.context.transaction():
                self.context.tokens = self.context.tokens[: self.cache.num_tokens]
                self.context.forget_after_cache()
