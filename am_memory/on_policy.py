"""On-policy fitting: each layer's slots are fitted to queries that come through the layers below as compacted.

    the block is repeated in one pass  ->  at each layer, lowest first: queries  ->  slots  ->  attention over them

What goes on to the next layer is what the compacted cache will give it, errors included, so that its fit can make up
for them (arXiv:2602.16284, section 3). No layer is run twice: scores of the layers above are not there yet, and a
budget that needs them is shared out within each layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from am_memory.budgets import Calibration
from am_memory.cache import KVCache
from am_memory.compaction import Compaction, Entries, Fitted, failures, fit_all, heads_of, slot_ranks
from am_memory.policy import MemoryPolicy, Plan
from am_memory.queries import OnLayer, Progress, ReferenceQueries
from am_memory.solver import exact_attention


def compact_on_policy(
    cache: KVCache,
    plan: Plan,
    num_pinned: int,
    repeat: Callable[[OnLayer], None],
    policy: MemoryPolicy,
    progress: Progress,
    calibration: Calibration | None = None,
) -> Compaction:
    """Replace the plan's newest segment's entries by slots, layer by layer while the block is repeated.

    Args:
        cache: afterwards as it was.
        num_pinned: tokens at the start that stay exact.
        repeat: shows each layer's queries before its attention goes on, and leaves the cache as it was.
        progress: told of the stage "fit", counted in KV heads.
        calibration: of the model, where the policy's `head_budget` asks for one.

    Returns:
        `score_seconds` is 0: scores are taken with the fit.

    Raises:
        CompactionFailed: out of memory, or a result that is not finite.
    """
    segment, layers = plan.newest, cache.compactable
    with failures(segment):
        entries = [Entries.of(layer, segment) for layer in layers]
        budget = _ranks_beforehand(entries, policy, calibration)
        together, seconds = Fitted([], {}, None), 0.0

        def compact_layer(index: int, queries: ReferenceQueries) -> None:
            nonlocal seconds
            started = time.perf_counter()
            layer, held = layers[index], entries[index]
            block = held.block(layer, queries)
            exact = exact_attention(block)
            ranks = budget[index] if budget else _ranks_within(exact.scores, index, len(layers), policy)
            fitted = fit_all(heads_of(index, layer, block, exact, held, ranks), plan, policy, lambda *told: None)
            (slots,) = fitted.by_layer(policy)
            layer.restore(cache.compacted_layer(layer, plan.segments, slots, num_pinned))
            together.fits.extend(fitted.fits)
            together.slots.update(fitted.slots)
            seconds += time.perf_counter() - started
            progress("fit", len(together.slots), cache.num_heads)

        repeat(compact_layer)
        state = cache.compacted(plan.segments, together.by_layer(policy), num_pinned)
    return Compaction.of(plan, state, together, 0.0, seconds)


def _ranks_beforehand(
    entries: list[Entries], policy: MemoryPolicy, calibration: Calibration | None
) -> tuple[Tensor, ...]:
    """The ranks of all layers' slots where a measurement on the model gives them; else none."""
    if calibration is None:
        return ()
    return slot_ranks([torch.empty(held.key.shape[:2]) for held in entries], policy, calibration)


def _ranks_within(scores: Tensor, index: int, num_layers: int, policy: MemoryPolicy) -> Tensor:
    """Ranks by one layer's own scores, (num_key_value_heads, seq_len): layers take turns."""
    (ranks,) = slot_ranks([scores], policy)
    return ranks * num_layers + index
