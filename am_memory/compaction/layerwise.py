"""On-policy fitting: a layer's slots are fitted to queries that have passed through the compacted layers below it.

    the block is repeated in one pass  ->  at each layer, lowest first: queries  ->  slots  ->  attention over them

A layer sees the errors of the layers below, as it will when the compacted cache is used, and its fit can make up for
them (arXiv:2602.16284, section 3). Every layer runs once. The number of slots of each head must be known before the
pass: a budget that needs the scores of all layers takes them from a pass of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from am_memory.budgets import Calibration
from am_memory.compaction.compact import failures
from am_memory.compaction.head_fits import HeadFits, fit_all
from am_memory.compaction.plan import Plan
from am_memory.compaction.scoring import LayerEntries, ScoredLayer, slot_ranks
from am_memory.engines.base import LayerwiseCache
from am_memory.policy import MemoryPolicy
from am_memory.queries import OnLayer, Progress, ReferenceQueries


def compact_on_policy(
    cache: LayerwiseCache,
    plan: Plan,
    num_pinned: int,
    repeat: Callable[[OnLayer], None],
    scored_by: Sequence[ReferenceQueries] | None,
    policy: MemoryPolicy,
    progress: Progress,
    calibration: Calibration | None = None,
) -> HeadFits:
    """Fit the slots that will replace the entries of the plan's newest segment, layer by layer in one pass.

    Args:
        cache: holds these entries; restored afterwards.
        num_pinned: tokens at the start that stay exact.
        repeat: runs the pass. It calls its argument with each layer's queries before that layer attends, and restores
            the cache.
        scored_by: one sample of queries for each compactable layer, if the head budget needs scores; else None.
        progress: called with the stage "fit", counted in KV heads.
        calibration: sensitivity curves of the model, if the policy's `head_budget` asks for them.

    Raises:
        CompactionFailed: out of memory, or a result that is not finite.
    """
    started = time.perf_counter()
    with failures(plan.newest):
        entries = [LayerEntries.read(layer, plan.newest) for layer in cache.compactable]
        scores = [torch.empty(held.key.shape[:2]) for held in entries]  # only the shape counts
        if scored_by is not None:
            in_order = enumerate(zip(cache.compactable, entries, scored_by, strict=True))
            scores = [ScoredLayer.of(index, *parts).exact.scores for index, parts in in_order]
        ranks = slot_ranks(scores, policy, calibration)
        score_seconds, fit_seconds = time.perf_counter() - started, 0.0
        fits: list[HeadFits] = []

        def compact_layer(index: int, queries: ReferenceQueries) -> None:
            nonlocal fit_seconds
            began, layer = time.perf_counter(), cache.compactable[index]
            heads = ScoredLayer.of(index, layer, entries[index], queries).heads(ranks[index])
            fits.append(fit_all(heads, plan, policy, progress=lambda stage, done, total: None))
            (slots,) = fits[-1].slots_by_layer(policy)
            cache.compact_layer(index, plan.segments, slots, num_pinned)
            fit_seconds += time.perf_counter() - began
            progress("fit", sum(len(of_layer.slots) for of_layer in fits), cache.num_heads)

        repeat(compact_layer)
        return HeadFits.join(plan, fits, score_seconds, fit_seconds)
