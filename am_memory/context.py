"""A watched context: the tokens, the cache derived from them, and the schedule of the compactions between.

Owns the watching: it reads tokens in chunks, and when the cache reaches its trigger it compacts the oldest part and
goes on. The tokens are the truth; tokens and schedule together rebuild the cache. Knows nothing of text or sampling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, cat

from am_memory.boundaries import best_boundary
from am_memory.budgets import calibration_for
from am_memory.cache import KVCache, Snapshot
from am_memory.compaction import Compaction, as_planned, compact, failures
from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import (
    BudgetTooSmall,
    CompactionFailed,
    InvalidInput,
    InvalidPolicy,
    PromptTooLong,
    UnsupportedOperation,
)
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    CompactionStarted,
    GateMissed,
    Listener,
    ReadProgress,
    SessionRebuilt,
    SpanPutAway,
    SpanRecalled,
    WindowExceeded,
)
from am_memory.on_policy import compact_on_policy
from am_memory.originals import Original, between, keep
from am_memory.policy import SINK_TOKENS, MemoryPolicy, Plan, ScheduledCompaction, Sizes, plan, richer, trigger_tokens
from am_memory.queries import LiveQueries, Passage, QuerySources
from am_memory.recall import Recalled, at_rest, brought_back, put_away
from am_memory.search import Span, search
from am_memory.slots import Segment, resized
from am_memory.summary import stand_in, write_summary

Weights = Callable[[int, int], Sequence[float] | None]
"""How much it counts that the tokens from one position to another can be repeated; None: all alike."""


@dataclass
class Context:
    """The tokens of one conversation and the compacting cache that holds them.

    Attributes:
        name: for events.
        tokens: every token, read or not; the cache holds the first `cache.num_tokens` of them.
        schedule: the compactions made so far, in order.
        num_pinned: tokens at the start that stay exact.
        weights: how much it counts that the tokens from one position to another can be repeated.
        originals: the exact entries of compacted tokens, as far as they are kept, in the order of the tokens.
        recalled: segments that are exact for now, the one recalled last at the end.
        live: the queries that passed, where the policy wants them.
        trigger: the physical size that fires a compaction, in tokens.
    """

    name: str
    engine: Engine
    policy: MemoryPolicy
    notify: Listener
    cache: SessionCache
    tokens: list[int] = field(default_factory=list)
    schedule: list[ScheduledCompaction] = field(default_factory=list)
    num_pinned: int = SINK_TOKENS
    weights: Weights = lambda start, end: None
    originals: tuple[Original, ...] = ()
    recalled: tuple[Recalled, ...] = ()

    def __post_init__(self) -> None:
        budget = self.policy.head_budget
        if budget not in ("auto", "uniform") and not self.cache.has_ragged_heads:
            raise InvalidPolicy(
                f"head_budget {budget!r} needs a cache whose heads can differ in their slots; this engine's heads "
                "share every cell: leave it at 'auto'"
            )
        self._calibration = calibration_for(budget, self.engine.info)
        if self.policy.originals != "drop" and not isinstance(self.cache, KVCache):
            raise InvalidPolicy(
                f"originals {self.policy.originals!r} needs a cache that exact entries can come back into; this "
                "engine's cells are shared by all heads: leave it at 'drop'"
            )
        if self.policy.segment_dtype != "model" and not isinstance(self.cache, KVCache):
            raise InvalidPolicy(
                f"segment_dtype {self.policy.segment_dtype!r} is for engine='transformers'; this engine keeps all "
                "cells in one type: leave it at 'model', and give the engine kv_type='q8_0'"
            )
        if self.policy.on_policy and not isinstance(self.cache, KVCache):
            raise InvalidPolicy(
                "on_policy needs a cache whose layers can be compacted one by one in the midst of a pass, which is "
                "engine='transformers': leave it at False"
            )
        if self.policy.summary_tokens is not None and self.engine.info.immovable is not None:
            raise InvalidPolicy(
                f"summary_tokens {self.policy.summary_tokens} needs keys that can be moved to where the block stood: "
                f"{self.engine.info.immovable}; leave it at None"
            )
        self.live = LiveQueries() if "live" in self.policy.reference_queries else None
        self.seek_live()
        self.trigger = trigger_tokens(self.policy, self.engine.info.window_tokens, self.num_pinned)

    def pin(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` exact; possible until the first compaction.

        Raises:
            InvalidPolicy: the trigger leaves nothing to compact beside them.
        """
        if self.schedule:
            raise InvalidInput(
                f"cannot pin {num_tokens} tokens after {len(self.schedule)} compactions: pin before the first one"
            )
        self.trigger = trigger_tokens(self.policy, self.engine.info.window_tokens, num_tokens)
        self.num_pinned = num_tokens

    def check(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidInput for ids that the model does not have."""
        vocab_size = self.engine.info.vocab_size
        for position, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise InvalidInput(
                    f"token id {token_id!r} at position {position} is outside the vocabulary of {vocab_size}; encode "
                    "the text with the model's own tokenizer"
                )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing: whatever is raised inside, the context is afterwards as it was before."""
        state, pinned, live = self.cache.state(), (self.num_pinned, self.trigger), self.live and self.live.copy()
        # Inside, both lists are only added to, or replaced.
        tokens, num_tokens, schedule, num_compactions = self.tokens, len(self.tokens), self.schedule, len(self.schedule)
        originals, recalled = self.originals, self.recalled
        try:
            yield
        except BaseException:
            self.cache.restore(state)
            del tokens[num_tokens:], schedule[num_compactions:]
            self.tokens, self.schedule, self.live = tokens, schedule, live
            self.num_pinned, self.trigger = pinned
            self.originals, self.recalled = originals, recalled
            raise

    def read(self, end: int) -> None:
        """Bring the first `end` tokens into the cache, compacting whenever the trigger is reached."""
        start = self.cache.num_tokens
        while (done := self.cache.num_tokens) < end:
            stop = done + min(self.make_room(end - done), self.policy.chunk_tokens)
            self.forward(self.tokens[done:stop])
            if end - start > self.policy.chunk_tokens:
                self.notify(ReadProgress(self.name, stop - start, end - start))

    @property
    def transformers_cache(self) -> KVCache:
        """The cache, where it is one of transformers.

        Raises:
            UnsupportedOperation: it is not.
        """
        if not isinstance(self.cache, KVCache):
            raise UnsupportedOperation(
                f"a {type(self.cache).__name__} cannot go into generate() of transformers: use a session, or "
                "engine='transformers'"
            )
        return self.cache

    def make_room(self, num_tokens: int) -> int:
        """Put away or compact while the trigger is reached.

        Returns:
            How many tokens may be read now, at most `num_tokens`.
        """
        while self.cache.kv_tokens + 1 > self.trigger:
            if self.recalled:
                self._put_away_oldest()
            else:
                self.compact()
        return min(num_tokens, int(self.trigger - self.cache.kv_tokens))

    def next_logits(self) -> Tensor:
        """Read everything; the logits of what follows the last token, (vocab_size,) float32."""
        self.read(len(self.tokens) - 1)
        self.make_room(1)
        return self.forward(self.tokens[-1:], num_logits=1)[0]

    def scratch_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits that follow the last token and each of `token_ids` but the last; the context stays as it is."""
        self.read(len(self.tokens) - 1)
        ids = [self.tokens[-1], *token_ids[:-1]]
        state, rows = self.cache.state(), []
        try:
            for start in range(0, len(ids), self.policy.chunk_tokens):
                chunk = ids[start : start + self.policy.chunk_tokens]
                rows.append(self.engine.forward(self.cache, chunk, num_logits=len(chunk)))
        finally:
            self.cache.restore(state)
        return cat(rows)

    def forward(self, token_ids: Sequence[int], num_logits: int = 0) -> Tensor:
        """Read tokens into the cache, as `Engine.forward` does, and keep their queries where the policy wants them."""
        self.watch_window(len(token_ids))
        on_query = self.live.add if self.live is not None else None
        return self.engine.forward(self.cache, token_ids, num_logits=num_logits, on_query=on_query)

    def watch_window(self, num_tokens: int) -> None:
        """Say so when the next tokens are the first at positions that the model was not trained on."""
        before, window = self.cache.num_tokens, self.engine.info.window_tokens
        if before <= window < before + num_tokens:
            self.notify(WindowExceeded(self.name, before + num_tokens, window, self._immovable))

    @property
    def sizes(self) -> Sizes:
        cache = self.cache
        return Sizes(
            cache.num_tokens,
            self.num_pinned,
            cache.num_tail_tokens,
            cache.segments,
            cache.num_heads,
            reach_tokens=self.engine.info.window_tokens if self._immovable is None else None,
        )

    @property
    def _immovable(self) -> str | None:
        """Why what is compact cannot be moved up when it gets too far away; None: it can."""
        if self.policy.recompaction == "refit":
            return "recompaction 'refit' has one segment for all that was said"
        return self.engine.info.immovable

    def compact(self, fraction: float | None = None) -> CompactionReport:
        """Compact the oldest part now; None: the policy's fraction, sparing the recent tokens."""
        while self.recalled:
            self._put_away_oldest()
        return self._apply(plan(self.policy, self.sizes, self.trigger, fraction, self._boundary))

    def _boundary(self, earliest: int, latest: int) -> int:
        """Where a block should end, which may be behind all that has been said."""
        if latest >= len(self.tokens):
            return latest
        return best_boundary(self.engine, self.tokens, earliest, latest)

    def _apply(self, plan: Plan, made: ScheduledCompaction | None = None) -> CompactionReport:
        """Make one planned compaction and swap it in; the gate may give it more slots, unless it is `made` already."""
        cache, segment = self.cache, plan.newest
        kv_tokens, kv_bytes = cache.kv_tokens, cache.nbytes
        self.notify(CompactionStarted(self.name, segment.start, segment.end, kv_tokens))

        def progress(stage: str, done: int, total: int) -> None:
            self.notify(CompactionProgress(self.name, stage, done, total))

        started = time.perf_counter()
        block = max(segment.start, cache.num_tokens - cache.num_tail_tokens), segment.end
        sources = QuerySources(self.engine, self.policy, self.live, progress)
        with failures(segment):
            passage, prepared = self._prepare(plan, block, made, sources)
            if self.policy.on_policy:
                result = self._compact_on_policy(passage, prepared.plan, sources)
            else:
                result = self._compact(passage, prepared.plan, sources, is_planned=made is not None)
        query_seconds = time.perf_counter() - started - result.score_seconds - result.fit_seconds
        segment = result.plan.newest
        originals = self.originals
        if self.policy.originals != "drop":
            entries = (layer.exact_entries(*block) for layer in cache.compactable)
            originals = (*originals, keep(*block, entries, self.policy.originals))
        cache.restore(result.state)
        self.originals = originals
        self.schedule.append(replace(prepared, plan=result.plan))
        report = CompactionReport(
            session=self.name,
            start=segment.start,
            end=segment.end,
            num_slots=segment.num_slots / cache.num_heads,
            kv_tokens_before=kv_tokens,
            kv_tokens_after=cache.kv_tokens,
            kv_bytes_before=kv_bytes,
            kv_bytes_after=cache.nbytes,
            mass_error=result.mass_error,
            output_error=result.output_error,
            query_seconds=query_seconds,
            score_seconds=result.score_seconds,
            fit_seconds=result.fit_seconds,
            num_unbiased_heads=result.num_unbiased_heads,
            held_out_error=result.held_out_error,
            summary_tokens=len(prepared.summary.answer) if prepared.summary else 0,
        )
        self.notify(CompactionFinished(self.name, report))
        limit = self.policy.max_error
        if limit is not None and result.held_out_error is not None and result.held_out_error > limit:
            self.notify(GateMissed(self.name, segment.start, segment.end, result.held_out_error, limit))
        return report

    def _compact(self, passage: Passage, plan: Plan, sources: QuerySources, *, is_planned: bool) -> Compaction:
        """With all queries at hand; a plan that was made before gets no more slots."""
        queries, cache = sources.sample(passage), passage.cache
        more = as_planned if is_planned else partial(richer, self.policy, self.trigger, cache.num_heads)
        pinned, progress = self.num_pinned, sources.progress
        return compact(cache, plan, pinned, queries, self.policy, progress, more, self._calibration)

    def _compact_on_policy(self, passage: Passage, plan: Plan, sources: QuerySources) -> Compaction:
        """Layer by layer, while the passage is repeated."""
        assert isinstance(passage.cache, KVCache)
        scored_by = sources.sample(passage) if self.policy.head_budget != "uniform" else None
        repeat, progress = partial(sources.through, passage), sources.progress
        return compact_on_policy(
            passage.cache, plan, self.num_pinned, repeat, scored_by, self.policy, progress, self._calibration
        )

    def _prepare(
        self, plan: Plan, block: tuple[int, int], made: ScheduledCompaction | None, sources: QuerySources
    ) -> tuple[Passage, ScheduledCompaction]:
        """What is compacted, the block or a summary in its place; what was planned and written."""
        cache, tokens, weights = self.cache, self.tokens, self.weights(*block)
        policy, (start, end) = self.policy, block
        conversations = made.conversations if made and made.conversations else sources.converse(cache)
        summary = made.summary if made else None
        if made is None and policy.summary_tokens is not None:
            max_tokens, on_progress = min(policy.summary_tokens, end - start), partial(sources.progress, "summary")
            summary = write_summary(self.engine, cache, end, max_tokens=max_tokens, on_progress=on_progress)
        if summary is not None and summary.answer:
            newest, pinned, chunk_tokens = plan.newest, self.num_pinned, policy.chunk_tokens
            cache = stand_in(self.engine, cache, summary, newest, pinned, chunk_tokens=chunk_tokens)
            newest = resized(newest, len(summary.answer) * cache.num_heads)
            plan = replace(plan, segments=(*plan.segments[:-1], newest))
            start, weights = end - len(summary.answer), None
            tokens = [*tokens[:start], *summary.answer]
        passage = Passage(cache, tokens, start, end, weights, conversations)
        return passage, ScheduledCompaction(cache.num_tokens, plan, conversations, summary)

    def recall(self, start: int, end: int) -> list[Segment]:
        """Bring the segments that hold any of the tokens [start, end) back exact, compacting others to make room.

        They stay until a compaction, or the trigger, needs the room: those go first that were recalled first.

        Returns:
            These segments.

        Raises:
            InvalidInput: there are no originals of them.
            PromptTooLong: they do not fit below the trigger.
        """
        while True:
            wanted = [segment for segment in self.cache.segments if segment.start < end and segment.end > start]
            held = [each for each in self.recalled if each.segment in wanted]
            self.recalled = (*(each for each in self.recalled if each not in held), *held)
            missing = [segment for segment in wanted if segment not in [each.segment for each in held]]
            if self._have_room_for(missing):
                break
            self._make_room_to_recall(wanted, others=len(self.recalled) > len(held))
        for segment in missing:
            self._bring_back(segment)
        return wanted

    def recall_again(self, start: int) -> None:
        """Bring back the segment that begins at `start`, where its originals are still there and it still fits."""
        for segment in self.cache.segments:
            is_held = between(self.originals, segment.start, segment.end) is not None
            if segment.start == start and is_held and self._have_room_for([segment]):
                self._bring_back(segment)

    def _have_room_for(self, segments: Sequence[Segment]) -> bool:
        """Whether these compact segments fit below the trigger when they are exact."""
        growth = sum(segment.num_tokens - segment.num_slots / self.cache.num_heads for segment in segments)
        return self.cache.kv_tokens + growth + 1 <= self.trigger

    def _make_room_to_recall(self, wanted: Sequence[Segment], *, others: bool) -> None:
        if others:
            self._put_away_oldest()
            return
        num_tokens = sum(segment.num_tokens for segment in wanted)
        refused = PromptTooLong(
            f"the {num_tokens} tokens of the segments to recall do not fit below the trigger of {self.trigger} beside "
            f"what else is held: recall a shorter span, or raise trigger_tokens"
        )
        if self.num_pinned + num_tokens + self.policy.keep_recent >= self.trigger:
            raise refused
        try:
            self.compact()
        except (CompactionFailed, BudgetTooSmall) as error:
            raise refused from error

    def search(self, text: str, span_tokens: int) -> list[Span]:
        """All compacted tokens, in spans of about `span_tokens`, and how much a text looks at each."""
        self.read(len(self.tokens) - 1)
        return search(
            self.engine,
            self.cache,
            self.tokens,
            self.originals,
            text,
            span_tokens=span_tokens,
            chunk_tokens=self.policy.chunk_tokens,
        )

    def _bring_back(self, segment: Segment) -> None:
        entries = between(self.originals, segment.start, segment.end)
        if entries is None:
            raise InvalidInput(
                f"tokens {segment.start} to {segment.end} cannot be recalled: their originals were not kept when they "
                "were compacted, or are lost; set the policy's originals to 'host' or 'disk' before that"
            )
        layers = zip(self.cache.compactable, entries, strict=True)
        entries = [(layer.turned(key, segment.shift), value) for layer, (key, value) in layers]
        state, recalled = brought_back(self.transformers_cache.state(), segment, entries)
        self.cache.restore(state)
        self.recalled = (*self.recalled, recalled)
        self.notify(SpanRecalled(self.name, segment.start, segment.end, self.cache.kv_tokens))

    def _put_away_oldest(self) -> None:
        """Of what is recalled."""
        oldest, *others = self.recalled
        self.cache.restore(put_away(self.transformers_cache.state(), oldest))
        self.recalled = tuple(others)
        self.notify(SpanPutAway(self.name, oldest.segment.start, oldest.segment.end, self.cache.kv_tokens))

    @property
    def state_at_rest(self) -> Snapshot:
        """The cache with nothing recalled."""
        return at_rest(self.transformers_cache.state(), self.recalled) if self.recalled else self.cache.state()

    @property
    def off_device_bytes(self) -> int:
        """What originals take, and the slots of recalled segments."""
        return sum(original.nbytes for original in self.originals) + sum(each.nbytes for each in self.recalled)

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens; rebuild where a forgotten one is in a segment."""
        if self.can_truncate(num_tokens):
            num_cached = self._num_cached(num_tokens)
            self.cache.truncate(num_cached)
            # A compaction that came later stays; a rebuild must find it before the tokens that are now to come.
            self.schedule = [replace(made, at_tokens=min(made.at_tokens, num_cached)) for made in self.schedule]
            self.tokens = self.tokens[:num_tokens]
            self.seek_live()
        else:
            self.rebuild(num_tokens, "the tokens to forget are compacted, or in a sliding window")

    def can_truncate(self, num_tokens: int) -> bool:
        """Whether all tokens after the first `num_tokens` are exact and can be dropped."""
        num_cached = self._num_cached(num_tokens)
        is_exact = num_cached >= self.cache.num_tokens - self.cache.num_tail_tokens
        return num_cached == self.cache.num_tokens or (is_exact and self.cache.is_croppable)

    def compacted_after(self, num_tokens: int) -> bool:
        """Whether a compaction was made when there were more than the first `num_tokens` tokens."""
        return any(made.at_tokens > self._num_cached(num_tokens) for made in self.schedule[-1:])

    def _num_cached(self, num_tokens: int) -> int:
        """Of the first `num_tokens` tokens, those in the cache when the last one is left to read."""
        return max(min(self.cache.num_tokens, num_tokens - 1), 0)

    def rebuild(self, num_tokens: int, reason: str) -> None:
        """Read the first `num_tokens` tokens again, with the compactions that were made among them."""
        self.notify(SessionRebuilt(self.name, num_tokens, reason))
        fresh = Context(
            self.name,
            self.engine,
            self.policy,
            self.notify,
            self.engine.new_cache(),
            self.tokens[:num_tokens],
            num_pinned=self.num_pinned,
            weights=self.weights,
        )
        for entry in self.schedule:
            if entry.at_tokens > num_tokens - 1:
                break
            fresh._replay(entry)
        fresh.read(num_tokens - 1)
        self.cache.restore(fresh.cache.state())
        self.tokens, self.schedule, self.live = fresh.tokens, fresh.schedule, fresh.live
        self.originals, self.recalled = fresh.originals, ()

    def _replay(self, entry: ScheduledCompaction) -> None:
        while (done := self.cache.num_tokens) < entry.at_tokens:
            self.forward(self.tokens[done : min(entry.at_tokens, done + self.policy.chunk_tokens)])
        self._apply(entry.plan, entry)

    def fork(self, name: str, policy: MemoryPolicy | None = None) -> Context:
        """The same context under another name; memory is shared until the two differ."""
        branch = replace(
            self,
            name=name,
            policy=policy or self.policy,
            cache=self.cache.fork(),
            tokens=list(self.tokens),
            schedule=list(self.schedule),
        )
        if self.live is not None and branch.live is not None:
            branch.live = self.live.copy()
        return branch

    def seek_live(self) -> None:
        """Tell the live queries where the cache is, after it has gone back."""
        if self.live is not None:
            self.live.seek(self.cache.num_tokens)
