"""All sources of reference queries that a policy names, joined. Knows no compaction, and not which block is next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import CompactionFailed
from am_memory.policy import MemoryPolicy
from am_memory.queries.live import LiveQueries, from_further_away
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import OnLayer, repeat_queries, repeat_through
from am_memory.queries.self_study import Conversations, self_study, self_study_queries
from am_memory.queries.spoken import spoken_positions

Progress = Callable[[str, int, int], None]
"""Called with (stage of a compaction, done, in all); a stage that takes queries is counted in tokens."""


class Passage(NamedTuple):
    """The part of a conversation that is compacted, for those who ask about it.

    Attributes:
        cache: holds it exact.
        token_ids: of the whole conversation.
        start, end: of the passage among them.
        weights: how much it counts that each of its tokens can be repeated; None: all alike.
        conversations: of self-study.
    """

    cache: SessionCache
    token_ids: Sequence[int]
    start: int
    end: int
    weights: Sequence[float] | None
    conversations: Conversations

    def spoken(self, engine: Engine) -> tuple[list[int], list[float] | None]:
        """The tokens that are repeated, and how much each of them counts."""
        positions = spoken_positions(engine, self.token_ids, self.start, self.end)
        weights = None if self.weights is None else [self.weights[position - self.start] for position in positions]
        return [self.token_ids[position] for position in positions], weights


@dataclass(frozen=True)
class QuerySources:
    """Where the queries of one context's compactions come from.

    Attributes:
        live: what passed anyway; None where the policy does without.
        progress: told of what is read or written for the queries alone.
    """

    engine: Engine
    policy: MemoryPolicy
    live: LiveQueries | None
    progress: Progress

    @property
    def chunk_tokens(self) -> int:
        """Tokens in one forward pass."""
        return self.policy.chunk_tokens or self.engine.chunk_tokens

    def converse(self, cache: SessionCache) -> Conversations:
        """Those of self-study, written anew; none where the policy does without."""
        if "self_study" not in self.policy.reference_queries:
            return ()
        num_tokens = self.policy.self_study_tokens
        return self_study(self.engine, cache, max_tokens=num_tokens, on_progress=partial(self.progress, "self_study"))

    def sample(self, passage: Passage) -> list[ReferenceQueries]:
        """The queries for a passage, of each compactable layer; its cache is afterwards as it was, whatever happens.

        Raises:
            CompactionFailed: only live queries are wanted, and none has passed.
        """
        samples, cache = [], passage.cache
        if "repeat" in self.policy.reference_queries:
            spoken, weights = passage.spoken(self.engine)
            on_progress = partial(self.progress, "repeat")
            samples.append(
                repeat_queries(
                    self.engine, cache, spoken, chunk_tokens=self.chunk_tokens, on_progress=on_progress, weights=weights
                )
            )
        if passage.conversations:
            conversations = passage.conversations
            samples.append(self_study_queries(self.engine, cache, conversations, chunk_tokens=self.chunk_tokens))
        if self.live is not None:
            passed = self.live.after(passage.end)
            if passed:
                if self.engine.info.immovable is None:
                    num_tokens = min(len(passage.token_ids), self.engine.info.window_tokens)
                    passed = from_further_away(passed, cache.compactable, num_tokens)
                samples.append(passed)
            elif not samples:
                raise CompactionFailed(
                    f"no query has passed since token {passage.end}, and reference_queries is live alone: read more "
                    'first, compact a smaller fraction, or add "repeat"'
                )
        return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]

    def through(self, passage: Passage, on_layer: OnLayer) -> None:
        """Show each layer's queries of the repeated passage to `on_layer`, which may compact the layer with them."""
        spoken, weights = passage.spoken(self.engine)
        repeat_through(self.engine, passage.cache, spoken, on_layer, weights=weights)
        self.progress("repeat", len(spoken), len(spoken))
