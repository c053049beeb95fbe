"""One refinement: a segment is compacted again, from its exact entries, while nobody waits.

    the cache as its compaction saw it  ->  queries that a turn had no time for  ->  as many slots as before

The result depends on tokens that the segment's compaction had seen, and on no later ones. It works on a cache of its
own, so that the conversation may go on meanwhile. It does not know when to refine, nor how the slots are swapped in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from torch import Tensor

from am_memory.budgets import Calibration
from am_memory.compaction.compact import compact, failures
from am_memory.compaction.head_fits import HeadFits
from am_memory.compaction.plan import Plan, completed
from am_memory.compaction.scoring import ScoredHead
from am_memory.engines.base import Engine, RefinableCache, SessionLayer, in_chunks
from am_memory.errors import CompactionFailed
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import MemoryPolicy
from am_memory.queries import LiveQueries, Passage, Progress, QuerySources, StudyConversations
from am_memory.recall.originals import Original, between
from am_memory.recall.paging import slots_of, turned
from am_memory.solver import Fit, output_error


def refining(policy: MemoryPolicy) -> MemoryPolicy:
    """The policy that a segment is refined under: other queries, and nothing that only a new segment can have."""
    experiments = policy.experiments.with_changes(on_policy=False, summary_tokens=None)
    return policy.with_changes(reference_queries=policy.refine_queries, max_error=None, experiments=experiments)


@dataclass(frozen=True)
class RefinementResult:
    """New slots for a segment, not swapped in yet.

    Attributes:
        slots: one `Slots` for each compactable layer, where the segment stands now.
        conversations: self-study's prompts and answers, to be read again when the refinement is repeated.
        error_before, error_after: RMS over heads of the attention output's relative error on the new queries.
        seconds: wall time.
    """

    slots: list[Slots]
    conversations: StudyConversations
    error_before: float
    error_after: float
    seconds: float


@dataclass(frozen=True)
class Refinement:
    """A refinement to be run. Everything in it stays as it is while the conversation goes on.

    Attributes:
        policy: as `refining` returns it.
        state: of the conversation's cache, with nothing recalled and nothing mounted.
        segment: one of the state's.
        tokens: of the conversation, to the end of the segment.
        later_tokens: the first ones behind it, as far as its compaction had seen them. The model repeats the segment
            from behind them, as in the compaction; their queries are the live ones.
        originals: hold the segment's exact entries.
        weights: how much each of the segment's tokens counts when it is repeated; None: all alike.
        calibration: sensitivity curves of the model, if the policy's `head_budget` asks for them.
        conversations: those of the refinement to make again; (): a new one.
    """

    engine: Engine
    policy: MemoryPolicy
    state: Snapshot
    segment: Segment
    tokens: Sequence[int]
    later_tokens: Sequence[int]
    originals: Sequence[Original]
    weights: Sequence[float] | None
    calibration: Calibration | None
    conversations: StudyConversations = ()

    def run(self, progress: Progress) -> RefinementResult:
        """Fit new slots.

        Args:
            progress: called at least once for each forward pass and each batch of fits; an exception that it raises
                ends the refinement.

        Raises:
            CompactionFailed: out of memory, a result that is not finite, or no originals.
            OriginalLost: the originals turned out to be lost just now.
        """
        started, segment = time.perf_counter(), self.segment
        with failures(segment):
            cache = self._cache_before()
            sources = QuerySources(self.engine, self.policy, self._read_on(cache, progress), progress)
            conversations = self.conversations or sources.converse(cache)
            passage = Passage(cache, self.tokens, segment.start, segment.end, self.weights, conversations)
            fits = compact(
                cache,
                Plan((segment,)),
                sources.sample(passage),
                completed(self.policy, self.engine),
                progress,
                calibration=self.calibration,
                is_shared=not self.engine.capabilities.has_ragged_heads,
            )
            layers = cache.compactable
            made = fits.slots_by_layer(self.policy)
            slots = [turned(new, layer, segment.shift) for new, layer in zip(made, layers, strict=True)]
            before = self._error_before(fits, layers)
        return RefinementResult(slots, conversations, before, fits.output_error, time.perf_counter() - started)

    def _cache_before(self) -> RefinableCache:
        """A cache that ends with the segment, whose tokens are exact."""
        entries = between(self.originals, self.segment.start, self.segment.end)
        if entries is None:
            raise CompactionFailed(
                f"tokens {self.segment.start} to {self.segment.end} cannot be refined: their originals were not kept, "
                "or are lost; nothing was changed"
            )
        cache = cast("RefinableCache", self.engine.new_cache())  # whoever made this asked for the capability
        cache.restore(self.state)
        cache.restore(cache.before(self.segment, entries))
        return cache

    def _read_on(self, cache: RefinableCache, progress: Progress) -> LiveQueries:
        """Read the later tokens; returns their queries if the policy uses them, else none."""
        live, num_read = LiveQueries(len(self.later_tokens)), 0
        live.seek(self.segment.end)
        on_query = live.add if "live" in self.policy.refine_queries else None
        for chunk in in_chunks(self.later_tokens, self.policy.chunk_tokens or self.engine.chunk_tokens):
            self.engine.forward(cache, chunk, on_query=on_query)
            num_read += len(chunk)
            progress("read", num_read, len(self.later_tokens))
        return live

    def _error_before(self, fits: HeadFits, layers: Sequence[SessionLayer]) -> float:
        """The output error of the slots that the segment has had so far, on the same queries as the new ones."""
        held, errors = slots_of(self.state), list[Tensor]()
        for layer, slots, (_, heads) in zip(layers, held, groupby(fits.slots, lambda head: head.layer), strict=True):
            mine = turned(slots.within(self.segment.start, self.segment.end), layer, -self.segment.shift)
            errors += [_error(head, mine.head(index)) for index, head in enumerate(heads)]
        return float(torch.cat(errors).square().mean().sqrt())


def _error(head: ScoredHead, slots: Slots) -> Tensor:
    """(1,) float32: the relative error of a head's attention output over some slots; 1 without any."""
    if not slots.num_slots:
        return head.exact.scores.new_ones(1)
    key, value, bias = (rows[None].float() for rows in (decoded(slots.key), decoded(slots.value), slots.bias))
    unknown = key.new_zeros(1)
    return output_error(head.block, Fit(key, bias, value, unknown, unknown), head.exact)
