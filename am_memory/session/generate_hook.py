"""`generate()` of transformers drives the model here, and reads into the cache of a context, which compacts.

Owns what the context must learn from each forward pass that it does not run itself: which tokens the pass reads, and
what an interrupted pass left in the cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor

from am_memory.compaction.plan import most_at_once
from am_memory.errors import UnsupportedOperation
from am_memory.events import ReadProgress
from am_memory.kv_cache.cache import KVCache
from am_memory.session.context import Context
from am_memory.session.limits import require_positions, require_token_ids
from am_memory.session.notices import warn_beyond_window


def watched(context: Context) -> KVCache:
    """The cache of a context, for forward passes that others run. It notes their tokens and makes room for them.

    The cache keeps its context alive, and not the other way round. With references in both directions, Python would
    free the memory only at its next garbage collection.

    Args:
        context: for this cache only from now on.

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
    watch = _Watch(context)
    cache.before_forward, cache.copied = watch.before_forward, watch.copied
    return cache


class _Watch:
    """Connects a cache to its context.

    Args:
        context: holds the cache by a weak reference.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.cache = cast("KVCache", context.cache)
        self._whole = self.cache.state()  # restored if a pass is interrupted

    def copied(self) -> KVCache:
        """A second cache with the same content, in a context of its own."""
        self._settle()
        return watched(self.context.fork(self.context.name))

    def before_forward(
        self, token_ids: Sequence[int], num_logits: int, at_once: int, what_for: str
    ) -> tuple[int, list[Tensor]]:
        """Note the tokens that a forward pass is about to read. If all are too many, read the first ones here.

        Args:
            token_ids: the tokens of the pass.
            num_logits: logits are wanted for this many tokens at the end.
            at_once: this many tokens at the end must be read in one pass.
            what_for: the output besides logits that the caller wants, for messages; "" for none.

        Returns:
            The number of tokens that were read here, the others being left to the pass; and the logits of those for
            which they are wanted, one tensor for each pass made here.

        Raises:
            UnsupportedOperation: no compaction makes room for `at_once` tokens.
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
        warn_beyond_window(context, end - cache.num_tokens)
        if context.live is not None:
            for index, layer in enumerate(cache.compactable):
                layer.query_sink = partial(context.live.add, index)
        self._whole, cache.num_announced = cache.state(), end
        return cache.num_tokens - start, logits

    def _have_room_for(self, num_tokens: int, at_once: int) -> bool:
        """Compact until `at_once` of the tokens fit; whether all of them fit then."""
        self.context.compact_if_due(min(num_tokens, at_once))
        return num_tokens <= self.context.room_tokens

    def _require_room(self, num_tokens: int, at_once: int, what_for: str) -> None:
        """Raise UnsupportedOperation if `at_once` tokens do not fit and no compaction is sure to make room for them."""
        if self.cache.kv_tokens + num_tokens <= self.context.due_tokens - self.context.policy.ahead_tokens:
            return
        most = most_at_once(self.context.policy, self.context.rest_tokens, self.context.num_fixed)
        if at_once <= most:
            return
        if what_for:
            raise UnsupportedOperation(
                f"a pass with {what_for} reads its {at_once} tokens at once, but only {most} are sure to fit "
                f"below the trigger of {self.context.trigger_tokens}: leave it out, read less at once, or raise "
                "trigger_tokens"
            )
        raise UnsupportedOperation(
            f"the logits of {at_once} tokens at once are more than the {most} that are sure to fit below the trigger "
            f"of {self.context.trigger_tokens}: let assisted decoding propose fewer (prompt_lookup_num_tokens, "
            "num_assistant_tokens), ask for all logits (logits_to_keep=0), or raise trigger_tokens"
        )

    def _settle(self) -> None:
        """Undo an interrupted pass, and forget the tokens that the caller has cropped."""
        if not self.cache.is_whole:
            self.cache.restore(self._whole)
        if self.cache.num_tokens != len(self.context.tokens):
            with self.context.transaction():
                self.context.tokens = self.context.tokens[: self.cache.num_tokens]
                self.context.forget_after_cache()
