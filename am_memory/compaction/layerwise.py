"""On-policy fitting: each layer's slots are fitted to queries that come through the layers below as compacted.

    the block is repeated in one pass  ->  at each layer, lowest first: queries  ->  slots  ->  attention over them

What goes on to the next layer is what the compacted cache will give it, errors included, so that its fit can make up
for them (arXiv:2602.16284, section 3). No layer is run twice for that. How many slots each head gets must be known
before: where a budget needs the scores of all layers, they come from a pass of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from am_memory.budgets import Calibration
from am_memory.compaction.compact import Compaction, Entries, Fitted, failures, fit_all, heads_of, slot_ranks
from am_memory.compaction.plan import Plan
from am_memory.kv_cache.cache import KVCache
from am_memory.policy import MemoryPolicy
from am_memory.queries import OnLayer, Progress, ReferenceQueries
from am_memory.solver import exact_attention


def compact_on_policy(
    cache: KVCache,
    plan: Plan,
    num_pinned: int,
    repeat: Callable[[OnLayer], None],
    scored_by: Sequence[ReferenceQueries] | None,
    policy: MemoryPolicy,
    progress: Progress,
    calibration: Calibration | None = None,
) -> Compaction:
    """Make the slots that are to replace the plan's newest segment's entries, layer by layer as the block is repeated.

    Args:
        cache: afterwards as it was.
        num_pinned: tokens at the start that stay exact.
        repeat: shows each layer's queries before its attention goes on, and leaves the cache as it was.
        scored_by: queries of each compactable layer, for a budget that needs the scores of all; None: it does not.
        progress: told of the stage "fit", counted in KV heads.
        calibration: of the model, where the policy's `head_budget` asks for one.

    Raises:
        CompactionFailed: out of memory, or a result that is not finite.
    """
    segment, layers, started = plan.newest, cache.compactable, time.perf_counter()
    with failures(segment):
        entries = [Entries.of(layer, segment) for layer in layers]
        scores = [torch.empty(held.key.shape[:2]) for held in entries]  # only the shape counts
        if scored_by is not None:
            blocks = (held.block(layer, sample) for layer, held, sample in zip(layers, entries, scored_by, strict=True))
            scores = [exact_attention(block).scores for block in blocks]
        ranks = slot_ranks(scores, policy, calibration)
        score_seconds = time.perf_counter() - started
        together, fit_seconds = Fitted([], {}, None), 0.0

        def compact_layer(index: int, queries: ReferenceQueries) -> None:
            nonlocal fit_seconds
            began = time.perf_counter()
            layer, held = layers[index], entries[index]
            block = held.block(layer, queries)
            exact = exact_attention(block)
            heads = heads_of(index, layer, block, exact, held, ranks[index])
            fitted = fit_all(heads, plan, policy, lambda *told: None)
            (slots,) = fitted.by_layer(policy)
            layer.restore(cache.compacted_layer(layer, plan.segments, slots, num_pinned))
            together.fits.extend(fitted.fits)
            together.slots.update(fitted.slots)
            fit_seconds += time.perf_counter() - began
            progress("fit", len(together.slots), cache.num_heads)

        repeat(compact_layer)
        return Compaction.of(plan, together, policy, score_seconds, fit_seconds)
