"""One compaction as it is ordered: all that it depends on, so that it can be made while its context goes on.

    the block, or a summary in its place  ->  reference queries  ->  scores and fits  ->  slots, to be swapped in

Works on the cache that it is given, and leaves that as it was. Knows not when to compact, and not what becomes of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from am_memory.budgets import Calibration
from am_memory.compaction.compact import Compaction, compact, failures, no_more_slots
from am_memory.compaction.layerwise import compact_on_policy
from am_memory.compaction.plan import Plan, with_more_slots
from am_memory.compaction.record import CompactionRecord
from am_memory.compaction.summary import stand_in, write_summary
from am_memory.engines.base import Engine, SessionCache
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.slots import resized
from am_memory.policy import MemoryPolicy
from am_memory.queries import LiveQueries, Passage, Progress, QuerySources
from am_memory.recall.originals import Original, keep


class CompactionResult(NamedTuple):
    """A compaction that is ready to be swapped in, into a cache that may have read on since.

    Attributes:
        record: makes it again, as if it were swapped in at once.
        original: the block's exact entries, where the policy keeps them.
        query_seconds: wall time of what is neither scoring nor fitting.
    """

    result: Compaction
    record: CompactionRecord
    original: Original | None
    query_seconds: float


@dataclass(frozen=True)
class CompactionJob:
    """A compaction to be made.

    Attributes:
        cache: holds the block exact; nobody reads into it while the order is carried out.
        tokens: of the conversation, to the end of the block or further.
        start: of the block's exact tokens, which end where the plan's newest segment does.
        num_pinned: tokens at the start that stay exact.
        trigger: the physical size that fires a compaction.
        place: where the block's exact entries are kept.
        weights: how much it counts that each of the block's tokens can be repeated; None: all alike.
        live: the queries that passed, where the policy wants them.
        calibration: of the model, where the policy's `head_budget` asks for one.
        replayed: the record of a compaction that is made again; None: a new one, to which the gate may give more slots.
    """

    engine: Engine
    policy: MemoryPolicy
    cache: SessionCache
    tokens: Sequence[int]
    plan: Plan
    start: int
    num_pinned: int
    trigger: int
    place: Literal["drop", "host", "disk"]
    weights: Sequence[float] | None
    live: LiveQueries | None
    calibration: Calibration | None
    replayed: CompactionRecord | None = None

    def run(self, progress: Progress) -> CompactionResult:
        """Carry it out; the cache is afterwards as it was.

        Args:
            progress: told of each stage; what it raises ends the work.

        Raises:
            CompactionFailed: out of memory, no queries, or a result that is not finite.
            StorageError: originals cannot be kept on disk.
        """
        started = time.perf_counter()
        sources = QuerySources(self.engine, self.policy, self.live, progress)
        with failures(self.plan.newest):
            passage, record = self._prepared(sources)
            compacted = self._on_policy if self.policy.experiments.on_policy else self._at_once
            result = compacted(passage, record.plan, sources)
        query_seconds = time.perf_counter() - started - result.score_seconds - result.fit_seconds
        return CompactionResult(result, replace(record, plan=result.plan), self._original(), query_seconds)

    @property
    def record(self) -> CompactionRecord:
        """As far as it is known before it is made."""
        if self.replayed is not None:
            return replace(self.replayed, lag_tokens=0, recalls=())
        at_tokens = self.cache.num_tokens
        live_start = self.live.start if self.live is not None else 0
        return CompactionRecord(at_tokens, self.plan, live_start=at_tokens if live_start is None else live_start)

    def _prepared(self, sources: QuerySources) -> tuple[Passage, CompactionRecord]:
        """What is compacted, the block or a summary in its place; what was planned and written."""
        cache, plan, policy, replayed, weights = self.cache, self.plan, self.policy, self.replayed, self.weights
        tokens, start, end = self.tokens, self.start, plan.newest.end
        conversations = replayed.conversations if replayed and replayed.conversations else sources.converse(cache)
        summary = replayed.summary if replayed else None
        summary_tokens = policy.experiments.summary_tokens
        if replayed is None and summary_tokens is not None:
            max_tokens, on_progress = min(summary_tokens, end - start), partial(sources.progress, "summary")
            summary = write_summary(self.engine, cache, end, max_tokens=max_tokens, on_progress=on_progress)
        if summary is not None and summary.answer:
            newest, pinned = plan.newest, self.num_pinned
            cache = stand_in(self.engine, cache, summary, newest, pinned, chunk_tokens=sources.chunk_tokens)
            newest = resized(newest, len(summary.answer) * cache.num_heads)
            plan = replace(plan, segments=(*plan.segments[:-1], newest))
            start, weights = end - len(summary.answer), None
            tokens = [*tokens[:start], *summary.answer]
        passage = Passage(cache, tokens, start, end, weights, conversations)
        return passage, replace(self.record, plan=plan, conversations=conversations, summary=summary)

    def _at_once(self, passage: Passage, plan: Plan, sources: QuerySources) -> Compaction:
        """With all queries at hand; a plan that was made before gets no more slots."""
        queries, cache = sources.sample(passage), passage.cache
        more = no_more_slots if self.replayed else partial(with_more_slots, self.policy, self.trigger, cache.num_heads)
        return compact(cache, plan, queries, self.policy, sources.progress, more, self.calibration)

    def _on_policy(self, passage: Passage, plan: Plan, sources: QuerySources) -> Compaction:
        """Layer by layer, while the passage is repeated."""
        assert isinstance(passage.cache, KVCache)
        scored_by = sources.sample(passage) if self.policy.head_budget != "uniform" else None
        repeat, progress = partial(sources.through, passage), sources.progress
        return compact_on_policy(
            passage.cache, plan, self.num_pinned, repeat, scored_by, self.policy, progress, self.calibration
        )

    def _original(self) -> Original | None:
        if self.place == "drop":
            return None
        block = self.start, self.plan.newest.end
        return keep(*block, (layer.exact_entries(*block) for layer in self.cache.compactable), self.place)
