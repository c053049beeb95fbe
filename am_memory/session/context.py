"""A context: the tokens of one conversation, the cache made from them, and the records of its compactions.

This is the loop. It reads tokens in chunks; when the cache reaches its trigger, it compacts the oldest part and reads
on. The tokens are the truth: from tokens and records the cache can be rebuilt (`rebuild.py`). Knows no text and no
sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from am_memory.budgets import calibration_for
from am_memory.compaction.background import BackgroundCompaction
from am_memory.compaction.compact import failures
from am_memory.compaction.job import CompactionResult
from am_memory.compaction.plan import CacheSizes, originals_place, require_progress, trigger_in_tokens
from am_memory.compaction.record import CompactionRecord, with_policy
from am_memory.compaction.requirements import require_capabilities
from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import InvalidInput
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    Listener,
    ReadProgress,
)
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.checkpoint import Checkpoint
from am_memory.policy import SINK_TOKENS, MemoryPolicy
from am_memory.queries import LiveQueries
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import Original
from am_memory.recall.paging import Recalled, at_rest
from am_memory.recall.search_queries import SearchQueries
from am_memory.session import checkpoints, jobs, mounting, notices, pages
from am_memory.session.chat_history import ChatHistory
from am_memory.session.kept_queries import read_and_keep_queries
from am_memory.session.limits import recall_room
from am_memory.session.mounts import NO_MOUNTS, Mounts
from am_memory.session.transaction import Before, Restorable, Transaction
from am_memory.storage.compact_text import TextCache
from am_memory.text.boundaries import best_boundary


@dataclass(eq=False)
class Context:
    """The tokens of one conversation and the compacting cache that holds them.

    Attributes:
        name: for events.
        original_store: makes originals, for all contexts of a memory.
        tokens: every token, read or not; the cache holds the first `cache.num_tokens` of them.
        records: the compactions so far, in order.
        num_pinned: tokens at the start that no compaction covers.
        history: the chat messages behind the tokens, kept here so that one step changes both or neither.
        originals: exact entries of compacted tokens, where the policy keeps them, in the order of the tokens.
        recalled: pages that are exact at the moment; the one recalled last stands at the end.
        mounts: the compact texts that stand beside the tokens.
        background_compaction: a compaction that runs while tokens are read, if the policy has `ahead_tokens`.
        recent_queries: those of the search heads for the last tokens that were read, where the engine hands them out.
        checkpoints: where a cache that cannot drop tokens can go back to, in the order of the tokens.
        live: the queries of the last tokens that were read, if the policy uses them.
        trigger_tokens: upper bound on the size of the cache.
        calibration: sensitivity curves of the model, if the policy's `head_budget` asks for them.
        awaited_text: the compact text for which room is made.
        before_step: the context before the step that runs now; None: no step runs.
        num_steps: steps so far. A thread that finds both as they were has seen no half of a step.
    """

    name: str
    engine: Engine
    policy: MemoryPolicy
    notify: Listener
    cache: SessionCache
    original_store: OriginalStore
    tokens: list[int] = field(default_factory=list)
    records: list[CompactionRecord] = field(default_factory=list)
    num_pinned: int = SINK_TOKENS
    history: ChatHistory = field(default_factory=ChatHistory)
    originals: tuple[Original, ...] = ()
    recalled: tuple[Recalled, ...] = ()
    mounts: Mounts = NO_MOUNTS
    background_compaction: BackgroundCompaction | None = None
    recent_queries: SearchQueries | None = None
    checkpoints: tuple[Checkpoint, ...] = ()

    def __post_init__(self) -> None:
        require_capabilities(self.policy, self.engine.capabilities)
        self.trigger_tokens = trigger_in_tokens(self.policy, self.engine.info.window_tokens)
        self.originals_place = originals_place(self.policy, self.engine.capabilities)
        self.awaited_text: TextCache | None = None
        self.before_step: Before | None = None
        self.num_steps, self._stages, self._recall_room = 0, notices.Stages(), self._room_beside(self.num_fixed)
        self.require_progress()
        self.calibration = calibration_for(self.policy.head_budget, self.engine.info)
        self.live = LiveQueries() if "live" in (self.policy.reference_queries or ()) else None
        self.forget_after_cache()

    def pin(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` exact. Possible until the first compaction.

        Raises:
            InvalidPolicy: the trigger leaves nothing to compact besides them.
        """
        if self.records:
            raise InvalidInput(
                f"cannot pin {num_tokens} tokens after {len(self.records)} compactions: pin before the first one"
            )
        self.require_progress(num_tokens - self.num_pinned)
        self.num_pinned, self.background_compaction = num_tokens, None

    def require_progress(self, more_fixed: int = 0) -> None:
        """Raise InvalidPolicy if the trigger leaves nothing to compact beside `num_fixed` and `more_fixed` tokens."""
        num_fixed, room = self._room_beside(self.num_fixed + more_fixed)
        require_progress(self.policy, self.trigger_tokens - room, num_fixed, room)

    @property
    def num_fixed(self) -> int:
        """Tokens and slots per KV head that no compaction makes fewer: those pinned, and those of mounted texts."""
        return self.num_pinned + math.ceil(mounting.size(self))

    def _room_beside(self, num_fixed: int) -> tuple[int, int]:
        """The number of fixed tokens, and the room for recalled pages beside them."""
        return num_fixed, recall_room(self.policy, self.engine, self.trigger_tokens, num_fixed)

    @property
    def recall_tokens(self) -> int:
        """The part of the trigger that is kept free for recalled pages."""
        if self._recall_room[0] != self.num_fixed:
            self._recall_room = self._room_beside(self.num_fixed)
        return self._recall_room[1]

    def transaction(self, *others: Restorable) -> Transaction:
        """A `with` block that changes the context and `others` completely or, if it raises, not at all."""
        return Transaction(self, others)

    @property
    def num_readable(self) -> int:
        """Tokens to read before a step ends: all but the last, which is read when its logits are needed."""
        return max(len(self.tokens) - 1, 0)

    @property
    def chunk_tokens(self) -> int:
        """Tokens read in one forward pass."""
        return self.policy.chunk_tokens or self.engine.chunk_tokens

    def read_all(self) -> None:
        """Read every token but the last."""
        if self.cache.num_tokens < self.num_readable:
            checkpoints.keep(self)
        self.read(self.num_readable)

    def read(self, end: int) -> None:
        """Read the first `end` tokens into the cache, and compact whenever that is due."""
        start = self.cache.num_tokens
        while (done := self.cache.num_tokens) < end:
            self.compact_if_due()
            stop = min(end, done + min(self.room_tokens, self.chunk_tokens))
            self.forward(self.tokens[done:stop])
            if end - start > self.chunk_tokens:
                self.notify(ReadProgress(self.name, stop - start, end - start))

    def next_logits(self, *, keeps_room: bool = False) -> Tensor:
        """Read everything. Logits of the next token, (vocab_size,) float32; see `prepare_next`."""
        self.prepare_next(keeps_room=keeps_room)
        return self.forward(self.tokens[-1:], num_logits=1)[0]

    def prepare_next(self, *, keeps_room: bool = False) -> None:
        """Read every token but the last, and compact so that it can be read.

        Args:
            keeps_room: make room for recalled pages first, see `pages.make_room`.
        """
        self.read_all()
        if keeps_room:
            pages.make_room(self)
        self.compact_if_due()

    def forward(self, token_ids: Sequence[int], num_logits: int = 0) -> Tensor:
        """Read tokens into the cache in one pass (see `Engine.forward`), and keep their queries if the policy does."""
        token_ids = mounting.read_waiting(self, token_ids)
        notices.warn_beyond_window(self, len(token_ids))
        return read_and_keep_queries(self, token_ids, num_logits)

    @property
    def rest_tokens(self) -> int:
        """Size of the cache without recalled pages at which a compaction is due while an answer is written."""
        return self.trigger_tokens - self.recall_tokens

    @property
    def due_tokens(self) -> int:
        """Size without recalled pages at which a compaction is due in any case.

        What is read recalls nothing and may take the room for pages. Compactions ahead of time keep it, for answers.
        """
        return self.rest_tokens if self.policy.ahead_tokens else self.trigger_tokens

    @property
    def tokens_at_rest(self) -> float:
        """Size of the cache without recalled pages: it does not depend on what was recalled."""
        extra_slots = sum(recalled.extra_slots for recalled in self.recalled)
        return round(self.kv_tokens - extra_slots / max(self.cache.num_heads, 1), 6)

    @property
    def kv_tokens(self) -> float:
        """Size of the cache, with the texts that are about to join it."""
        return self.cache.kv_tokens + mounting.size_awaited(self)

    @property
    def room_tokens(self) -> int:
        """Tokens that can be read before a compaction is due, or recalled pages have to be put away."""
        is_ahead = self.background_compaction is None
        due_at = self.due_tokens - (self.policy.ahead_tokens if is_ahead else 0)
        return int(min(due_at - self.tokens_at_rest, self.trigger_tokens - self.kv_tokens))

    def compact_if_due(self, at_once: int = 1) -> None:
        """Compact until `at_once` more tokens fit, or put away pages that were recalled beyond `recall_tokens`.

        Args:
            at_once: no more than `plan.most_at_once`.
        """
        if self.background_compaction is not None:
            self.background_compaction.relay(self.progress)
        while self.room_tokens < at_once:
            if self.recalled and self.trigger_tokens - self.kv_tokens < at_once:
                pages.put_away(self, self.recalled[0])
            elif self.background_compaction is None and self.policy.ahead_tokens:
                self.start_background_compaction()
            else:
                self.compact()

    def start_background_compaction(self) -> None:
        """Start a compaction in the background, to be swapped in at the trigger."""
        self.background_compaction = BackgroundCompaction(jobs.next_compaction(self, self.fork_at_rest()))
        self.background_compaction.start()  # after the assignment: a transaction that is undone stops what it finds

    def cancel_background_compaction(self) -> None:
        """Stop the compaction that runs in the background; reading on starts it again."""
        stopped, self.background_compaction = self.background_compaction, None
        if stopped is not None:
            stopped.stop()

    def compact(self, fraction: float | None = None) -> CompactionReport:
        """Compact the oldest part of the cache now; a long one becomes several segments, one after another.

        Args:
            fraction: of the cache without its pinned tokens. None: swap in the compaction that runs in the background;
                if none does, compact what the policy says and spare its recent tokens.
        """
        held = pages.put_all_away(self)
        if self.background_compaction is not None and fraction is None:
            report = self.swap_in(self.background_compaction.result(self.progress))
        else:
            report = self.swap_in(jobs.next_compaction(self, self.cache, fraction).run(self.progress))
        mounting.move_near(self)
        pages.bring_back_all(self, held)
        return report

    def fork_at_rest(self) -> SessionCache:
        """A second cache with the same content, and without the recalled pages."""
        cache = self.cache.fork()
        if self.recalled:
            cache.restore(at_rest(cache.state(), self.recalled))
        return cache

    def swap_in(self, results: Sequence[CompactionResult]) -> CompactionReport:
        """Replace a block by its slots, segment by segment. The cache may have grown since the compaction began."""
        kept_before = self.sizes.kept_share
        report = CompactionReport.joined([self._swap_in(result) for result in results])
        self.background_compaction = None
        self.notify(CompactionFinished(self.name, report))
        notices.warn(self, report, kept_before)
        return report

    def _swap_in(self, result: CompactionResult) -> CompactionReport:
        cache, record = self.cache, result.record
        kv_tokens, kv_bytes = cache.kv_tokens, cache.nbytes
        with failures(record.plan.newest):
            state = result.swapped_in(cache, self.num_pinned)
        cache.restore(state)
        self.checkpoints = tuple(held for held in self.checkpoints if held.num_tokens >= cache.num_tokens)
        self.originals = (*self.originals, *result.originals)
        self.records.append(replace(record, lag_tokens=cache.num_tokens - record.at_tokens))
        return result.report(self.name, kv_tokens, kv_bytes, cache)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Emit the progress of a compaction, at each third of a stage."""
        if self._stages.is_further(stage, done, total):
            self.notify(CompactionProgress(self.name, stage, done, total))

    @property
    def sizes(self) -> CacheSizes:
        """The sizes that a plan depends on."""
        cache = self.cache
        return CacheSizes(
            cache.num_tokens,
            self.num_pinned,
            cache.segments,
            cache.num_heads,
            recall_tokens=self.recall_tokens,
            window_tokens=self.engine.info.window_tokens if self.why_keys_stay is None else None,
        )

    @property
    def why_keys_stay(self) -> str | None:
        """Why compacted keys cannot move to nearer positions; None: they can."""
        if self.policy.experiments.recompaction == "refit":
            return "recompaction 'refit' has one segment for all that was said"
        can = self.engine.capabilities
        return None if can.can_rotate_keys else can.why_keys_stay

    def boundary(self, earliest: int, latest: int) -> int:
        """The best end of a block; it may lie behind the last token."""
        is_last = latest >= len(self.tokens)
        return latest if is_last else best_boundary(self.engine, self.tokens, earliest, latest)

    @property
    def state_at_rest(self) -> Snapshot:
        """The cache without recalled pages; while a background compaction runs, the cache from which it started.

        Going on from there reads the tokens since then again, and starts the same compaction.
        """
        state = at_rest(self.cache.state(), self.recalled) if self.recalled else self.cache.state()
        return state if self.background_compaction is None else self.background_compaction.began_from(state)

    def forget_after_cache(self) -> None:
        """Drop kept queries, checkpoints and a background compaction that are of tokens behind the cache's end."""
        if self.live is not None:
            self.live.seek(self.cache.num_tokens)
        if self.recent_queries is not None:
            self.recent_queries = self.recent_queries.until(self.cache.num_tokens)
        self.checkpoints = tuple(held for held in self.checkpoints if held.num_tokens <= self.cache.num_tokens)
        running = self.background_compaction
        if running is not None and self.cache.num_tokens < running.at_tokens:
            self.background_compaction = None

    def fork(self, name: str, policy: MemoryPolicy | None = None) -> Context:
        """A copy under another name, and another policy if one is given. It shares memory until the two differ."""
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
