"""A compaction job: everything that one compaction depends on, so that it can run while the conversation goes on.

    the block, or a summary in its place  ->  reference queries  ->  scores and fits  ->  a result to be swapped in

It leaves its cache as it found it. It does not know when to compact, nor how the result is swapped in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

from am_memory.budgets import Calibration
from am_memory.compaction.compact import compact, failures, no_more_slots
from am_memory.compaction.head_fits import HeadFits
from am_memory.compaction.layerwise import compact_on_policy
from am_memory.compaction.plan import Plan, completed, with_more_slots
from am_memory.compaction.record import CompactionRecord
from am_memory.compaction.summary import replace_by_summary, write_summary
from am_memory.engines.base import Engine, LayerwiseCache, SessionCache
from am_memory.events import CompactionReport
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.slots import Slots, resized
from am_memory.policy import MemoryPolicy
from am_memory.queries import LiveQueries, Passage, Progress, QuerySources
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import Original


@dataclass(frozen=True)
class CompactionResult:
    """A finished compaction that is not swapped in yet. The cache may have grown since it began.

    Attributes:
        record: what is kept to make the compaction again, as if it were swapped in at once. The newest segment of its
            plan may have more slots than the job planned.
        slots: of the newest segment, one `Slots` for each compactable layer; `SessionCache.compacted` takes them.
        originals: the exact entries of the block, if the policy keeps them.
        mass_error, output_error: root mean square over all heads of the fit's errors on the reference queries.
        held_out_error: the output error on queries held out of the fits; None if none were held out.
        num_unbiased_heads: KV heads without biases, because theirs cannot be folded into their keys.
        query_seconds, score_seconds, fit_seconds: wall time; the first covers all but scoring and fitting.
    """

    record: CompactionRecord
    slots: list[Slots]
    originals: tuple[Original, ...]
    mass_error: float
    output_error: float
    held_out_error: float | None
    num_unbiased_heads: int
    query_seconds: float
    score_seconds: float
    fit_seconds: float

    def swapped_in(self, cache: SessionCache, num_pinned: int) -> Snapshot:
        """The state of a cache with the slots in the place of the segment's exact entries."""
        return cache.compacted(self.record.plan.segments, self.slots, num_pinned)

    def report(self, session: str, kv_tokens: float, kv_bytes: int, cache: SessionCache) -> CompactionReport:
        """The report for users.

        Args:
            kv_tokens, kv_bytes: size of the cache before the result was swapped in.
            cache: after that.
        """
        segment = self.record.plan.newest
        return CompactionReport(
            session=session,
            start=segment.start,
            end=segment.end,
            num_slots=segment.num_slots / cache.num_heads,
            kv_tokens_before=kv_tokens,
            kv_tokens_after=cache.kv_tokens,
            kv_bytes_before=kv_bytes,
            kv_bytes_after=cache.nbytes,
            mass_error=self.mass_error,
            output_error=self.output_error,
            query_seconds=self.query_seconds,
            score_seconds=self.score_seconds,
            fit_seconds=self.fit_seconds,
            num_unbiased_heads=self.num_unbiased_heads,
            held_out_error=self.held_out_error,
            summary_tokens=len(self.record.summary.answer) if self.record.summary else 0,
        )


@dataclass(frozen=True)
class CompactionJob:
    """A compaction to be run.

    Attributes:
        cache: holds the block exact. Nothing else may use it while the job runs.
        tokens: of the conversation, at least to the end of the block.
        start: where the block's exact tokens begin; they end with the plan's newest segment.
        num_pinned: tokens at the start that stay exact.
        trigger_tokens: the trigger without the room for recalled pages.
        originals: where the exact entries of the block are kept.
        original_store: makes these originals.
        weights: how much each of the block's tokens counts when it is repeated; None: all alike.
        live: queries of tokens that were read after the block, if the policy uses them.
        calibration: sensitivity curves of the model, if the policy's `head_budget` asks for them.
        replayed: the record of the compaction to make again. None: this is a new one, and the gate may add slots.
    """

    engine: Engine
    policy: MemoryPolicy
    cache: SessionCache
    tokens: Sequence[int]
    plan: Plan
    start: int
    num_pinned: int
    trigger_tokens: int
    originals: Literal["drop", "host", "disk"]
    original_store: OriginalStore
    weights: Sequence[float] | None
    live: LiveQueries | None
    calibration: Calibration | None
    replayed: CompactionRecord | None = None

    def run(self, progress: Progress) -> CompactionResult:
        """Compact the block; the cache is afterwards as it was.

        Args:
            progress: called at each stage; an exception that it raises ends the job.

        Raises:
            CompactionFailed: out of memory, no queries, or a result that is not finite.
        """
        started = time.perf_counter()
        sources = QuerySources(self.engine, completed(self.policy, self.engine), self.live, progress)
        with failures(self.plan.newest):
            passage, record = self._prepare(sources)
            if record.plan.newest.num_slots == 0:
                return self._without_slots(record, started)
            fit = self._fit_on_policy if self.policy.experiments.on_policy else self._fit
            fits = fit(passage, record.plan, sources)
        return CompactionResult(
            record=replace(record, plan=fits.plan),
            slots=fits.slots_by_layer(self.policy),
            originals=self._originals(),
            mass_error=fits.mass_error,
            output_error=fits.output_error,
            held_out_error=fits.held_out_error,
            num_unbiased_heads=fits.num_unbiased_heads,
            query_seconds=time.perf_counter() - started - fits.score_seconds - fits.fit_seconds,
            score_seconds=fits.score_seconds,
            fit_seconds=fits.fit_seconds,
        )

    def _without_slots(self, record: CompactionRecord, started: float) -> CompactionResult:
        """The block leaves nothing but its originals."""
        start = self.plan.newest.start
        slots = [Slots.exact(*layer.exact_entries(start, start), start) for layer in self.cache.compactable]
        seconds = time.perf_counter() - started
        return CompactionResult(record, slots, self._originals(), 1.0, 1.0, None, 0, seconds, 0.0, 0.0)

    def _prepare(self, sources: QuerySources) -> tuple[Passage, CompactionRecord]:
        """The passage to compact (the block, or a summary in its place), and its record."""
        record, end = self._record(sources), self.plan.newest.end
        if record.summary is None or not record.summary.answer:
            return Passage(self.cache, self.tokens, self.start, end, self.weights, record.conversations), record
        answer, newest = record.summary.answer, self.plan.newest
        cache = replace_by_summary(
            self.engine, self.cache, record.summary, newest, self.num_pinned, chunk_tokens=sources.chunk_tokens
        )
        segments = (*self.plan.segments[:-1], resized(newest, len(answer) * cache.num_heads))
        start = end - len(answer)
        passage = Passage(cache, [*self.tokens[:start], *answer], start, end, None, record.conversations)
        return passage, replace(record, plan=replace(self.plan, segments=segments))

    def _record(self, sources: QuerySources) -> CompactionRecord:
        """The record, with the texts that the model writes for a compaction: those replayed, or new ones."""
        if (replayed := self.replayed) is not None:
            conversations = replayed.conversations or sources.converse(self.cache)
            return replace(
                replayed, plan=self.plan, conversations=conversations, lag_tokens=0, recalls=(), refinements=()
            )
        conversations, summary = sources.converse(self.cache), None
        if self.policy.experiments.summary_tokens is not None:
            end = self.plan.newest.end
            summary = write_summary(
                self.engine,
                self.cache,
                end,
                max_tokens=min(self.policy.experiments.summary_tokens, end - self.start),
                on_progress=sources.stage("summary"),
            )
        at_tokens = self.cache.num_tokens
        live_start = self.live.start if self.live is not None else 0
        return CompactionRecord(
            at_tokens, self.plan, conversations, summary, live_start=at_tokens if live_start is None else live_start
        )

    def _fit(self, passage: Passage, plan: Plan, sources: QuerySources) -> HeadFits:
        """Fit all layers to queries of the exact cache."""
        more_slots = partial(with_more_slots, self.policy, self.trigger_tokens, passage.cache.num_heads)
        return compact(
            passage.cache,
            plan,
            sources.sample(passage),
            sources.policy,
            sources.progress,
            more_slots=more_slots if self.replayed is None else no_more_slots,
            calibration=self.calibration,
            is_shared=not self.engine.capabilities.has_ragged_heads,
        )

    def _fit_on_policy(self, passage: Passage, plan: Plan, sources: QuerySources) -> HeadFits:
        """Fit each layer to queries that have passed through the compacted layers below it."""
        cache = cast("LayerwiseCache", passage.cache)  # the policy was checked against the engine's capabilities
        scored_by = sources.sample(passage) if self.policy.head_budget != "uniform" else None
        repeat, progress = partial(sources.repeat_through, passage), sources.progress
        return compact_on_policy(
            cache,
            plan,
            self.num_pinned,
            repeat,
            scored_by,
            sources.policy,
            progress,
            self.calibration,
        )

    def _originals(self) -> tuple[Original, ...]:
        if self.originals == "drop":
            return ()
        block = self.start, self.plan.newest.end
        entries = (layer.exact_entries(*block) for layer in self.cache.compactable)
        return self.original_store.keep(*block, entries, self.originals)


@dataclass(frozen=True)
class BlockJob:
    """A whole compaction: a job for each segment of the block, at least one, in the order of the tokens.

    Attributes:
        jobs: they have one cache. Each plan goes on from the segments of the one before.
    """

    jobs: tuple[CompactionJob, ...]

    @property
    def cache(self) -> SessionCache:
        """Holds the block exact. Nothing else may use it while the jobs run."""
        return self.jobs[0].cache

    @property
    def engine(self) -> Engine:
        return self.jobs[0].engine

    def run(self, progress: Progress) -> list[CompactionResult]:
        """Compact the segments one after another; the cache is afterwards as it was.

        Args:
            progress: called at each stage, counted over all segments; an exception that it raises ends the jobs.

        Returns:
            A result for each segment, to be swapped in one after another.

        Raises:
            CompactionFailed: as `CompactionJob.run` does.
        """
        before, results = self.cache.state(), list[CompactionResult]()
        try:
            for number, job in enumerate(self.jobs):
                if results:
                    with failures(job.plan.newest):
                        self.cache.restore(results[-1].swapped_in(self.cache, job.num_pinned))
                result = job.run(partial(self._report, progress, number))
                results.append(replace(result, record=replace(result.record, continues=number > 0)))
        finally:
            if len(self.jobs) > 1:
                self.cache.restore(before)
        return results

    def _report(self, progress: Progress, number: int, stage: str, done: int, total: int) -> None:
        progress(stage, number * total + done, len(self.jobs) * total)
