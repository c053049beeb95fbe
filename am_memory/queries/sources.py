"""All sources of reference queries that a policy names, joined. Does not know how a compaction uses the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import CompactionFailed
from am_memory.policy import MemoryPolicy
from am_memory.queries.live import LiveQueries, from_further_away
from am_memory.queries.message_tokens import message_token_positions
from am_memory.queries.predicted import predicted_queries
from am_memory.queries.query_maps import query_maps
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import OnLayer, repeat_queries, repeat_request, repeat_through
from am_memory.queries.scratch import require_scaling
from am_memory.queries.self_study import StudyConversations, self_study, self_study_queries

Progress = Callable[[str, int, int], None]
"""Called with (stage of a compaction, done, in all); stages that read are counted in tokens."""


class Passage(NamedTuple):
    """The part of a conversation that is compacted.

    Attributes:
        cache: holds the passage exact.
        token_ids: of the whole conversation, at least to the end of the passage.
        start, end: the passage is `token_ids[start:end]`.
        weights: how much each of its tokens counts when it is repeated; None: all alike.
        conversations: self-study's prompts and answers about it.
    """

    cache: SessionCache
    token_ids: Sequence[int]
    start: int
    end: int
    weights: Sequence[float] | None
    conversations: StudyConversations

    def message_tokens(self, engine: Engine) -> tuple[list[int], list[float] | None]:
        """The tokens of the passage that are repeated, and how much each of them counts."""
        positions, weights = self.message_positions(engine)
        return [self.token_ids[position] for position in positions], weights

    def message_positions(self, engine: Engine) -> tuple[list[int], list[float] | None]:
        """Where these tokens stand, and how much each of them counts."""
        positions = message_token_positions(engine, self.token_ids, self.start, self.end)
        weights = None if self.weights is None else [self.weights[position - self.start] for position in positions]
        return positions, weights


@dataclass(frozen=True)
class QuerySources:
    """The reference queries of one context's compactions.

    Attributes:
        policy: names at least one source.
        live: queries of tokens that were read after the passage; None if the policy does not use them.
        progress: called while tokens are read or generated for their queries alone.
    """

    engine: Engine
    policy: MemoryPolicy
    live: LiveQueries | None
    progress: Progress

    def stage(self, name: str) -> Callable[[int, int], None]:
        """The progress of one stage, called with (done, in all)."""
        return partial(self.progress, name)

    @property
    def _named(self) -> tuple[str, ...]:
        return self.policy.reference_queries or ()

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.policy.chunk_tokens or self.engine.chunk_tokens

    def converse(self, cache: SessionCache) -> StudyConversations:
        """Generate self-study's answers; none if the policy does not use self-study."""
        if "self_study" not in self._named:
            return ()
        max_tokens = self.policy.self_study_tokens
        return self_study(self.engine, cache, max_tokens=max_tokens, on_progress=self.stage("self_study"))

    def sample(self, passage: Passage) -> list[ReferenceQueries]:
        """Take the queries for a passage, from all sources together.

        Returns:
            One sample for each compactable layer. The passage's cache is afterwards as it was, whatever happens.

        Raises:
            CompactionFailed: the policy uses live queries alone, and no token was read after the passage.
        """
        samples, cache, chunk_tokens = [], passage.cache, self.chunk_tokens
        named, can_predict = self._named, self._can_predict(passage)
        if "predicted" in named and can_predict:
            samples.append(self._predicted_queries(passage))
        if "repeat" in named or ("predicted" in named and not can_predict):
            token_ids, weights = passage.message_tokens(self.engine)
            samples.append(
                repeat_queries(
                    self.engine,
                    cache,
                    token_ids,
                    chunk_tokens=chunk_tokens,
                    on_progress=self.stage("repeat"),
                    weights=weights,
                )
            )
        if passage.conversations:
            samples.append(self._study_queries(passage))
        if self.live is not None and (live := self._live_queries(passage, self.live)):
            samples.append(live)
        if not samples:
            raise CompactionFailed(
                f"no query has passed since token {passage.end}, and reference_queries is live alone: read more first, "
                'compact a smaller fraction, or add "predicted"'
            )
        return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]

    def _can_predict(self, passage: Passage) -> bool:
        """Whether the passage's keys can be rotated back. A summary's keys stand among the slots, and are repeated."""
        return self.engine.capabilities.can_rotate_keys and passage.start >= passage.cache.tail_start

    def _predicted_queries(self, passage: Passage) -> list[ReferenceQueries]:
        """The queries of a repeat, without one."""
        require_scaling(self.engine, passage.cache, passage.token_ids[passage.end - 1])
        positions, weights = passage.message_positions(self.engine)
        return predicted_queries(
            query_maps(self.engine, passage.cache, self.stage("measure")),
            passage.cache,
            positions,
            num_before=len(repeat_request(self.engine)),
            on_progress=self.stage("predict"),
            weights=weights,
        )

    def _study_queries(self, passage: Passage) -> list[ReferenceQueries]:
        """The queries of self-study; its progress is full, and is reported again with each pass."""
        written, report = self.policy.self_study_tokens, self.stage("self_study")
        return self_study_queries(
            self.engine,
            passage.cache,
            passage.conversations,
            chunk_tokens=self.chunk_tokens,
            on_read=lambda num_tokens: report(written, written),
        )

    def _live_queries(self, passage: Passage, live: LiveQueries) -> list[ReferenceQueries]:
        queries = live.after(passage.end)
        if not self.engine.capabilities.can_rotate_keys:
            return queries
        num_tokens = min(len(passage.token_ids), self.engine.info.window_tokens)
        return from_further_away(queries, passage.cache.compactable, num_tokens) if queries else []

    def repeat_through(self, passage: Passage, on_layer: OnLayer) -> None:
        """Repeat the passage in one pass, and call `on_layer` with each layer's queries; it may compact the layer."""
        token_ids, weights = passage.message_tokens(self.engine)
        repeat_through(self.engine, passage.cache, token_ids, on_layer, weights=weights)
        self.progress("repeat", len(token_ids), len(token_ids))
