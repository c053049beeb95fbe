"""A watched context: the tokens, the cache derived from them, and the records of the compactions between.

Owns the watching: it reads tokens in chunks, and when the cache reaches its trigger it compacts the oldest part and
goes on. The tokens are the truth; tokens and records together rebuild the cache. Knows nothing of text or sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor, cat

from am_memory.budgets import calibration_for
from am_memory.compaction.background import BackgroundCompaction
from am_memory.compaction.compact import failures
from am_memory.compaction.job import CompactionJob, CompactionResult
from am_memory.compaction.plan import CacheSizes, Plan, checked_trigger_tokens, most_at_once, plan_compaction
from am_memory.compaction.record import CompactionRecord, RecallRecord, with_policy
from am_memory.compaction.requirements import require
from am_memory.engines.base import Engine, SessionCache, in_chunks
from am_memory.errors import (
    BudgetTooSmall,
    CompactionFailed,
    InvalidInput,
    OriginalLost,
    PromptTooLong,
)
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    CompactionStarted,
    GateMissed,
    Listener,
    OriginalsLost,
    ReadProgress,
    SessionRebuilt,
    SpanPutAway,
    SpanRecalled,
    WindowExceeded,
)
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.slots import Segment
from am_memory.policy import SINK_TOKENS, MemoryPolicy
from am_memory.queries import LiveQueries, scratch
from am_memory.recall.originals import Original, between
from am_memory.recall.paging import Recalled, at_rest, brought_back, put_away
from am_memory.recall.search import Span, search
from am_memory.session.chat_history import ChatHistory
from am_memory.session.rebuild import rebuilt
from am_memory.session.transaction import Restorable, Transaction
from am_memory.text.boundaries import best_boundary

T = TypeVar("T")


@dataclass
class Context:
    """The tokens of one conversation and the compacting cache that holds them.

    Attributes:
        name: for events.
        tokens: every token, read or not; the cache holds the first `cache.num_tokens` of them.
        records: the compactions made so far, in order.
        num_pinned: tokens at the start that stay exact.
        history: the messages that the tokens are of; kept here, so that one step changes both or neither.
        originals: the exact entries of compacted tokens, as far as they are kept, in the order of the tokens.
        recalled: segments that are exact for now, the one recalled last at the end.
        background_compaction: a compaction under way while tokens are read, where the policy has `ahead_tokens`.
        live: the queries that passed, where the policy wants them.
        trigger_tokens: the physical size that fires a compaction, in tokens.
    """

    name: str
    engine: Engine
    policy: MemoryPolicy
    notify: Listener
    cache: SessionCache
    tokens: list[int] = field(default_factory=list)
    records: list[CompactionRecord] = field(default_factory=list)
    num_pinned: int = SINK_TOKENS
    history: ChatHistory = field(default_factory=ChatHistory)
    originals: tuple[Original, ...] = ()
    recalled: tuple[Recalled, ...] = ()
    background_compaction: BackgroundCompaction | None = None

    def __post_init__(self) -> None:
        require(self.policy, self.engine.capabilities)
        self._calibration = calibration_for(self.policy.head_budget, self.engine.info)
        self.live = LiveQueries() if "live" in self.policy.reference_queries else None
        self.forget_after_cache()
        self.trigger_tokens = checked_trigger_tokens(self.policy, self.engine.info.window_tokens, self.num_pinned)

    def pin(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` exact; possible until the first compaction.

        Raises:
            InvalidPolicy: the trigger leaves nothing to compact beside them.
        """
        if self.records:
            raise InvalidInput(
                f"cannot pin {num_tokens} tokens after {len(self.records)} compactions: pin before the first one"
            )
        self.trigger_tokens = checked_trigger_tokens(self.policy, self.engine.info.window_tokens, num_tokens)
        self.num_pinned, self.background_compaction = num_tokens, None

    def require_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidInput for ids that the model does not have."""
        vocab_size = self.engine.info.vocab_size
        for position, token_id in enumerate(token_ids):
            if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
                raise InvalidInput(
                    f"token id {token_id!r} at position {position} is outside the vocabulary of {vocab_size}; encode "
                    "the text with the model's own tokenizer"
                )

    def require_positions(self, num_tokens: int) -> None:
        """Raise PromptTooLong where the model has no positions for so many tokens."""
        most = self.engine.info.max_tokens
        if most is not None and num_tokens > most:
            raise PromptTooLong(
                f"{num_tokens:,} tokens are more than the {most:,} for which {self.engine.info.name} has positions: "
                "rewind, begin a new session, or use a model with RoPE"
            )

    def limit_new_tokens(self, max_new_tokens: int) -> int:
        """So many tokens, or as many as the model can write: there is no position for what follows the last of them.

        Raises:
            PromptTooLong: it can write none.
        """
        self.require_positions(len(self.tokens))
        most = self.engine.info.max_tokens
        return max_new_tokens if most is None else min(max_new_tokens, most - len(self.tokens) + 1)

    def transaction(self, *others: Restorable) -> Transaction:
        """All or nothing: whatever is raised inside, the context and these others are as they were before."""
        return Transaction(self, others)

    def read(self, end: int) -> None:
        """Bring the first `end` tokens into the cache, compacting whenever the trigger is reached."""
        start = self.cache.num_tokens
        while (done := self.cache.num_tokens) < end:
            stop = done + min(self.make_room(end - done), self.chunk_tokens)
            self.forward(self.tokens[done:stop])
            if end - start > self.chunk_tokens:
                self.notify(ReadProgress(self.name, stop - start, end - start))

    def make_room(self, num_tokens: int, at_once: int = 1) -> int:
        """Put away, begin a compaction or swap one in, while the size is reached at which that is due.

        Args:
            num_tokens: to be read, if there is room.
            at_once: there has to be room for so many, `most_at_once` at most.

        Returns:
            How many tokens may be read now, at most `num_tokens`.
        """
        if self.background_compaction is not None:
            self.background_compaction.relay(self.progress)
        while self.cache.kv_tokens + at_once > (
            due := self.start_tokens if self.background_compaction is None else self.trigger_tokens
        ):
            if self.recalled:
                self._put_away_oldest()
            elif self.background_compaction is None and self.policy.ahead_tokens:
                self.begin()
            else:
                self.compact()
        return min(num_tokens, int(due - self.cache.kv_tokens))

    def begin(self) -> None:
        """Begin a compaction, to be swapped in at the trigger."""
        planned = plan_compaction(self.policy, self.sizes, self.trigger_tokens, None, self._boundary)
        self.background_compaction = BackgroundCompaction(self.job(planned, self.cache.fork()))
        self.background_compaction.start()  # only now: whoever takes this step back stops what it began

    @property
    def chunk_tokens(self) -> int:
        """Tokens read in one forward pass."""
        return self.policy.chunk_tokens or self.engine.chunk_tokens

    @property
    def most_at_once(self) -> int:
        """The most tokens for which compactions are sure to make room at once."""
        return most_at_once(self.policy, self.trigger_tokens, self.num_pinned)

    @property
    def start_tokens(self) -> int:
        """The physical size at which a compaction is begun, to be swapped in at the trigger."""
        return self.trigger_tokens - self.policy.ahead_tokens

    def next_logits(self) -> Tensor:
        """Read everything; the logits of what follows the last token, (vocab_size,) float32."""
        self.read(len(self.tokens) - 1)
        self.make_room(1)
        return self.forward(self.tokens[-1:], num_logits=1)[0]

    def scratch_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits that follow the last token and each of `token_ids` but the last; the context stays as it is."""
        self.read(len(self.tokens) - 1)
        ids = [self.tokens[-1], *token_ids[:-1]]
        with scratch(self.cache):
            chunks = in_chunks(ids, self.chunk_tokens)
            return cat([self.engine.forward(self.cache, chunk, num_logits=len(chunk)) for chunk in chunks])

    def forward(self, token_ids: Sequence[int], num_logits: int = 0) -> Tensor:
        """Read tokens into the cache, as `Engine.forward` does, and keep their queries where the policy wants them."""
        self.notify_beyond_window(len(token_ids))
        on_query = self.live.add if self.live is not None else None
        return self.engine.forward(self.cache, token_ids, num_logits=num_logits, on_query=on_query)

    def notify_beyond_window(self, num_tokens: int) -> None:
        """Say so when the next tokens are the first at positions that the model was not trained on."""
        before, window = self.cache.num_tokens, self.engine.info.window_tokens
        if before <= window < before + num_tokens:
            self.notify(WindowExceeded(self.name, before + num_tokens, window, self._immovable))

    @property
    def sizes(self) -> CacheSizes:
        cache = self.cache
        return CacheSizes(
            cache.num_tokens,
            self.num_pinned,
            cache.segments,
            cache.num_heads,
            window_tokens=self.engine.info.window_tokens if self._immovable is None else None,
        )

    @property
    def _immovable(self) -> str | None:
        """Why what is compact cannot be moved up when it gets too far away; None: it can."""
        if self.policy.experiments.recompaction == "refit":
            return "recompaction 'refit' has one segment for all that was said"
        can = self.engine.capabilities
        return None if can.can_rotate_keys else can.why_keys_stay

    def compact(self, fraction: float | None = None) -> CompactionReport:
        """Compact the oldest part now; None: what is under way, or the policy's fraction, sparing the recent tokens."""
        while self.recalled:
            self._put_away_oldest()
        if self.background_compaction is not None and fraction is None:
            return self.swap_in(self.background_compaction.result(self.progress))
        planned = plan_compaction(self.policy, self.sizes, self.trigger_tokens, fraction, self._boundary)
        return self.swap_in(self.job(planned, self.cache).run(self.progress))

    def _boundary(self, earliest: int, latest: int) -> int:
        """Where a block should end, which may be behind all that has been said."""
        if latest >= len(self.tokens):
            return latest
        return best_boundary(self.engine, self.tokens, earliest, latest)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.notify(CompactionProgress(self.name, stage, done, total))

    def job(self, plan: Plan, cache: SessionCache, replayed: CompactionRecord | None = None) -> CompactionJob:
        """Say that a planned compaction begins, on this cache or a branch of it; it is `replayed`, or new."""
        segment, policy, calibration, live_start = plan.newest, self.policy, self._calibration, 0
        if replayed is not None:
            live_start = replayed.live_start
            if replayed.policy is not None:
                policy, calibration = replayed.policy, calibration_for(replayed.policy.head_budget, self.engine.info)
        self.notify(CompactionStarted(self.name, segment.start, segment.end, cache.kv_tokens))
        start = max(segment.start, cache.tail_start)
        return CompactionJob(
            engine=self.engine,
            policy=policy,
            cache=cache,
            tokens=self.tokens[: segment.end],
            plan=plan,
            start=start,
            num_pinned=self.num_pinned,
            trigger_tokens=self.trigger_tokens,
            originals=self.policy.originals,
            weights=self.history.token_weights(policy.tool_result_weight, start, segment.end),
            live=self.live.since(live_start) if self.live and "live" in policy.reference_queries else None,
            calibration=calibration,
            replayed=replayed,
        )

    def swap_in(self, result: CompactionResult) -> CompactionReport:
        """Put a compaction in its place; the cache may have read on since it was begun."""
        cache, record, segment = self.cache, result.record, result.record.plan.newest
        kv_tokens, kv_bytes = cache.kv_tokens, cache.nbytes
        with failures(segment):
            state = cache.compacted(record.plan.segments, result.slots, self.num_pinned)
        cache.restore(state)
        self.background_compaction = None
        if result.original is not None:
            self.originals = (*self.originals, result.original)
        self.records.append(replace(record, lag_tokens=cache.num_tokens - record.at_tokens))
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
            query_seconds=result.query_seconds,
            score_seconds=result.score_seconds,
            fit_seconds=result.fit_seconds,
            num_unbiased_heads=result.num_unbiased_heads,
            held_out_error=result.held_out_error,
            summary_tokens=len(record.summary.answer) if record.summary else 0,
        )
        self.notify(CompactionFinished(self.name, report))
        limit = self.policy.max_error
        if limit is not None and result.held_out_error is not None and result.held_out_error > limit:
            self.notify(GateMissed(self.name, segment.start, segment.end, result.held_out_error, limit))
        return report

    def reading_originals(self, use: Callable[[], T]) -> T:
        """Do what reads originals, without those that are lost; what turns out to be is told, and it is done again."""
        while True:
            self.miss_originals()
            with suppress(OriginalLost):
                return use()

    def miss_originals(self) -> None:
        """Go on without the originals that turned out to be lost, and tell of them."""
        for lost in [each for each in self.originals if each.lost is not None]:
            self.originals = tuple(each for each in self.originals if each is not lost)
            self.notify(OriginalsLost(self.name, lost.start, lost.end, lost.lost or ""))

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
            for each in held:
                self.page(each.segment.start, is_exact=True)
            missing = [segment for segment in wanted if segment not in [each.segment for each in held]]
            if not missing or self._have_room_for(missing):
                break
            self._make_room_to_recall(wanted, others=len(self.recalled) > len(held))
        for segment in missing:
            self.page(segment.start, is_exact=True)
        return wanted

    def resume_recall(self, start: int) -> None:
        """Go on with a recall that a saved session had; where originals or room are lacking, it has ended here."""
        segment = self._segment_at(start)
        if segment is None:
            return
        if self._have_room_for([segment]):
            with suppress(InvalidInput):
                self._bring_back(segment)
                return
        self._record_recall(start, is_exact=False)

    def page(self, start: int, *, is_exact: bool) -> None:
        """Have the segment that begins at `start` exact, as the one recalled last, or compact again.

        Raises:
            InvalidInput: there are no originals of it, or no such segment.
        """
        held = next((each for each in self.recalled if each.segment.start == start), None)
        if not is_exact and held is not None:
            self.cache.restore(put_away(self.cache.state(), held))
            self.notify(SpanPutAway(self.name, held.segment.start, held.segment.end, self.cache.kv_tokens))
        elif held is None:
            if (segment := self._segment_at(start)) is None:
                raise InvalidInput(f"no segment begins at token {start}: there are {self.cache.segments}")
            self._bring_back(segment)
            held = self.recalled[-1]
        others = tuple(each for each in self.recalled if each is not held)
        self.recalled = (*others, held) if is_exact else others
        self._record_recall(start, is_exact=is_exact)

    def _segment_at(self, start: int) -> Segment | None:
        return next((segment for segment in self.cache.segments if segment.start == start), None)

    def _record_recall(self, start: int, *, is_exact: bool) -> None:
        """In the records: what is read from now on sees the segment so."""
        *before, last = self.records
        recall = RecallRecord(self.cache.num_tokens, start, is_exact)
        self.records = [*before, replace(last, recalls=(*last.recalls, recall))]

    def _have_room_for(self, segments: Sequence[Segment]) -> bool:
        """Whether these compact segments fit below where a compaction begins when they are exact."""
        growth = sum(segment.num_tokens - segment.num_slots / self.cache.num_heads for segment in segments)
        return self.cache.kv_tokens + growth + 1 <= self.start_tokens

    def _make_room_to_recall(self, wanted: Sequence[Segment], *, others: bool) -> None:
        if others:
            self._put_away_oldest()
            return
        num_tokens = sum(segment.num_tokens for segment in wanted)
        refused = PromptTooLong(
            f"the {num_tokens} tokens of the segments to recall do not fit below the trigger of {self.trigger_tokens} "
            f"beside what else is held: recall a shorter span, or raise trigger_tokens"
        )
        if self.num_pinned + num_tokens + self.policy.keep_recent >= self.start_tokens:
            raise refused
        try:
            self.compact()
        except (CompactionFailed, BudgetTooSmall) as error:
            raise refused from error

    def search(self, text: str, span_tokens: int) -> list[Span]:
        """All compacted tokens, in spans of about `span_tokens`, and how much a text looks at each."""
        self.read(len(self.tokens) - 1)
        return self.reading_originals(
            lambda: search(
                self.engine,
                self.cache,
                self.tokens,
                self.originals,
                text,
                span_tokens=span_tokens,
                chunk_tokens=self.chunk_tokens,
            )
        )

    def _bring_back(self, segment: Segment) -> None:
        entries = self.reading_originals(lambda: between(self.originals, segment.start, segment.end))
        if entries is None:
            raise InvalidInput(
                f"tokens {segment.start} to {segment.end} cannot be recalled: their originals were not kept when they "
                "were compacted, or are lost; set the policy's originals to 'host' or 'disk' before that"
            )
        layers = zip(self.cache.compactable, entries, strict=True)
        entries = [(layer.turned(key, segment.shift), value) for layer, (key, value) in layers]
        state, recalled = brought_back(self.cache.state(), segment, entries)
        self.cache.restore(state)
        self.recalled = (*self.recalled, recalled)
        self.notify(SpanRecalled(self.name, segment.start, segment.end, self.cache.kv_tokens))

    def _put_away_oldest(self) -> None:
        """Of what is recalled."""
        self.page(self.recalled[0].segment.start, is_exact=False)

    @property
    def state_at_rest(self) -> Snapshot:
        """The cache with nothing recalled; as it was when a compaction began that is under way.

        Whoever goes on from there reads what came since again, and begins the same compaction.
        """
        if self.background_compaction is not None:
            return self.background_compaction.began_from(self.cache.state())
        return at_rest(self.cache.state(), self.recalled) if self.recalled else self.cache.state()

    @property
    def off_device_bytes(self) -> int:
        """What originals take, and the slots of recalled segments."""
        return sum(original.nbytes for original in self.originals) + sum(each.nbytes for each in self.recalled)

    def rewind(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` tokens; rebuild where a segment holds, or was fitted to, others."""
        if not self.can_truncate(num_tokens):
            seen = "a compaction has seen the tokens to forget"
            lost = "the tokens to forget are compacted, or in a sliding window"
            self.rebuild(num_tokens, seen if self._was_seen_after(num_tokens) else lost)
            return
        num_cached = self._num_cached(num_tokens)
        self.cache.truncate(num_cached)
        # What came later and saw none of them stays; a rebuild must find it before the tokens that are now to come.
        self.records = [made.within(num_cached) for made in self.records]
        self.tokens = self.tokens[:num_tokens]
        self.forget_after_cache()

    def can_truncate(self, num_tokens: int) -> bool:
        """Whether all tokens after the first `num_tokens` are exact and can be dropped, and no compaction saw them."""
        num_cached = self._num_cached(num_tokens)
        is_exact = num_cached >= self.cache.tail_start
        is_cut = num_cached == self.cache.num_tokens or (is_exact and self.cache.is_croppable)
        return is_cut and not self._was_seen_after(num_tokens)

    def _was_seen_after(self, num_tokens: int) -> bool:
        """Whether a compaction was made when there were more than the first `num_tokens` tokens.

        Its queries were asked from behind them all, so that of fewer tokens another one would be made.
        """
        return any(made.at_tokens > self._num_cached(num_tokens) for made in self.records[-1:])

    def compacted_after(self, num_tokens: int) -> bool:
        """Whether a compaction was swapped in when there were more than the first `num_tokens` tokens."""
        return any(made.swapped_at > self._num_cached(num_tokens) for made in self.records[-1:])

    def _num_cached(self, num_tokens: int) -> int:
        """Of the first `num_tokens` tokens, those in the cache when the last one is left to read."""
        return max(min(self.cache.num_tokens, num_tokens - 1), 0)

    def rebuild(self, num_tokens: int, reason: str) -> None:
        """Read the first `num_tokens` tokens again, as far as they were read, with all that was done among them."""
        self.notify(SessionRebuilt(self.name, num_tokens, reason))
        fresh = rebuilt(self, num_tokens, self._num_cached(num_tokens))
        self.cache.restore(fresh.cache.state())
        self.tokens, self.records, self.originals = fresh.tokens, fresh.records, fresh.originals
        self.recalled, self.background_compaction = fresh.recalled, fresh.background_compaction
        self.live = fresh.live if self.live is not None else None

    def emptied(self, num_tokens: int) -> Context:
        """Another context of the first `num_tokens` tokens, of which nothing is read."""
        cache, tokens = self.engine.new_cache(), self.tokens[:num_tokens]
        pinned, history = self.num_pinned, self.history
        return Context(
            self.name, self.engine, self.policy, self.notify, cache, tokens, num_pinned=pinned, history=history
        )

    def fork(self, name: str, policy: MemoryPolicy | None = None) -> Context:
        """The same context under another name; memory is shared until the two differ."""
        is_same = policy is None or policy == self.policy
        if self.background_compaction is not None and is_same:
            self.background_compaction.is_shared = True
        branch = replace(
            self,
            name=name,
            policy=policy or self.policy,
            cache=self.cache.fork(),
            tokens=list(self.tokens),
            records=list(self.records) if is_same else with_policy(self.policy, self.records),
            background_compaction=self.background_compaction if is_same else None,
        )
        if self.live is not None and branch.live is not None:
            branch.live = self.live.copy()
        return branch

    def forget_after_cache(self) -> None:
        """Take note that the cache may have gone back, before what passed, or began, since then."""
        if self.live is not None:
            self.live.seek(self.cache.num_tokens)
        if self.background_compaction is not None and self.cache.num_tokens < self.background_compaction.at_tokens:
            self.background_compaction = None

    def cancel_background_compaction(self) -> None:
        """Stop what is under way; whoever reads on begins it anew."""
        stopped, self.background_compaction = self.background_compaction, None
        if stopped is not None:
            stopped.stop()
