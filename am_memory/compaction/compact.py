"""One compaction: a segment's exact entries become a few slots per head (arXiv:2602.16284, sections 3 and 4).

    1. read    the segment's keys and values of each layer, and the reference queries that came to that layer
    2. score   each key by the attention that these queries spend on it      (scoring.py)
    3. rank    all heads of all layers: which head gets the next slot        (scoring.py, am_memory/budgets/)
    4. fit     the slots of each head: which keys, their biases, their values (head_fits.py, am_memory/solver/)
    5. gate    while the error on held-out queries is too large, add slots and fit again

The cache is only read. `job.py` says what is compacted and takes the queries; the session swaps the slots in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from am_memory.budgets import Calibration
from am_memory.compaction.head_fits import HeadFits, fit_all
from am_memory.compaction.plan import Plan
from am_memory.compaction.scoring import LayerEntries, ScoredLayer, slot_ranks
from am_memory.engines.base import SessionCache
from am_memory.errors import CompactionFailed, InvalidInput
from am_memory.kv_cache.slots import Segment
from am_memory.policy import MemoryPolicy
from am_memory.queries import Progress, ReferenceQueries

MoreSlots = Callable[[Plan], Plan | None]
"""Returns the plan with more slots for its newest segment, or None if there is no room for more."""


def no_more_slots(plan: Plan) -> None:
    """A `MoreSlots` for a plan that must stay as it is."""


def compact(
    cache: SessionCache,
    plan: Plan,
    queries: Sequence[ReferenceQueries],
    policy: MemoryPolicy,
    progress: Progress,
    *,
    more_slots: MoreSlots = no_more_slots,
    calibration: Calibration | None = None,
    is_shared: bool = False,
) -> HeadFits:
    """Fit the slots that will replace the entries of the plan's newest segment.

    Args:
        cache: holds these entries; it is only read.
        queries: one sample for each compactable layer.
        progress: called with the stages "score" (counted in layers) and "fit" (counted in KV heads).
        more_slots: called while the held-out error is above the policy's `max_error`.
        calibration: sensitivity curves of the model, if the policy's `head_budget` asks for them.
        is_shared: every slot is shared by all heads, so that no head can have more than another.

    Raises:
        CompactionFailed: out of memory, or a result that is not finite.
    """
    started = time.perf_counter()
    with failures(plan.newest):
        layers = []
        for index, (layer, sample) in enumerate(zip(cache.compactable, queries, strict=True)):
            layers.append(ScoredLayer.of(index, layer, LayerEntries.read(layer, plan.newest), sample))
            progress("score", index + 1, len(queries))
        scores = [layer.exact.scores for layer in layers]
        ranks = slot_ranks(scores, policy, calibration, is_shared=is_shared)
        heads = [head for layer, layer_ranks in zip(layers, ranks, strict=True) for head in layer.heads(layer_ranks)]
        scored = time.perf_counter()

        fits = fit_all(heads, plan, policy, progress)
        while not fits.passes(policy.max_error) and (richer_plan := more_slots(fits.plan)) is not None:
            fits = fit_all(heads, richer_plan, policy, progress)
        return replace(fits, score_seconds=scored - started, fit_seconds=time.perf_counter() - scored)


@contextmanager
def failures(segment: Segment) -> Iterator[None]:
    """Raise `CompactionFailed` where a compaction runs out of memory, or meets keys that are not finite."""
    try:
        yield
    except InvalidInput as error:
        raise CompactionFailed(
            f"tokens {segment.start} to {segment.end} cannot be compacted: {error}; nothing was changed"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise CompactionFailed(
            f"out of memory while compacting {segment.num_tokens} tokens; nothing was changed: lower trigger_tokens or "
            "compact_fraction, so that fewer are compacted at once"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether host or device memory did not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
