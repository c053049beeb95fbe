"""Checkpoints of a context: an answer is generated again, or a message edited, without reading all that came before.

One is kept where messages are added, and where the opening of an answer is read. A long message may be read in many
steps, which keep none. Caches that can drop any token need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from am_memory.kv_cache.checkpoint import Checkpoint

if TYPE_CHECKING:
    from am_memory.session.context import Context

MAX_CHECKPOINTS = 8
"""Checkpoints of a context, the last ones."""
LEAST_CHECKPOINTS = 2
"""So many are kept whatever their size: where the last message begins, and where its answer does."""
MAX_BYTES = 256 * 2**20
"""Host memory that a context's checkpoints may take beyond that."""


def keep(context: Context) -> None:
    """Keep a checkpoint of the cache as it is."""
    cache, held = context.cache, context.checkpoints
    if cache.can_drop_tokens or not cache.num_tokens or (held and held[-1].num_tokens == cache.num_tokens):
        return
    held = (*held, Checkpoint.of(cache.num_tokens, cache.state()))[-MAX_CHECKPOINTS:]
    while len(held) > LEAST_CHECKPOINTS and sum(checkpoint.nbytes for checkpoint in held) > MAX_BYTES:
        held = held[1:]
    context.checkpoints = held


def last_before(context: Context, num_cached: int) -> Checkpoint | None:
    """The last checkpoint from which nothing but reading led to the first `num_cached` tokens."""
    last = context.records[-1:]
    swaps = [record.swapped_at for record in last]
    steps = [step.at_tokens for record in last for step in record.steps]
    steps += [record.at_tokens for record in context.mounts.records]
    changed_at = max([*swaps, *(at_tokens for at_tokens in steps if at_tokens <= num_cached)], default=0)
    usable = [held for held in context.checkpoints if changed_at <= held.num_tokens <= num_cached]
    return usable[-1] if usable else None
