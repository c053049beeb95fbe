"""All sources of reference queries that a policy names, joined. Knows no compaction, and not which block is next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import CompactionFailed
from am_memory.policy import MemoryPolicy
from am_memory.queries.live import LiveQueries
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.repeat_prefill import repeat_queries
from am_memory.queries.self_study import Conversations, self_study, self_study_queries
from am_memory.queries.spoken import spoken_positions

Progress = Callable[[str, int, int], None]
"""Called with (stage of a compaction, done, in all); a stage that takes queries is counted in tokens."""


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

    def converse(self, cache: SessionCache) -> Conversations:
        """Those of self-study, written anew; none where the policy does without."""
        if "self_study" not in self.policy.reference_queries:
            return ()
        num_tokens = self.policy.self_study_tokens
        return self_study(self.engine, cache, max_tokens=num_tokens, on_progress=partial(self.progress, "self_study"))

    def sample(
        self,
        cache: SessionCache,
        token_ids: Sequence[int],
        block: tuple[int, int],
        weights: Sequence[float] | None,
        conversations: Conversations,
    ) -> list[ReferenceQueries]:
        """The queries for a block, of each compactable layer.

        Args:
            cache: holds the block; it is afterwards as it was, whatever happens.
            token_ids: of the whole context.
            block: where it starts and ends among them.
            weights: how much it counts that each token of the block can be repeated; None: all alike.
            conversations: of self-study.

        Raises:
            CompactionFailed: only live queries are wanted, and none has passed.
        """
        samples, (start, end), chunk_tokens = [], block, self.policy.chunk_tokens
        if "repeat" in self.policy.reference_queries:
            spoken = spoken_positions(self.engine, token_ids, start, end)
            repeated = repeat_queries(
                self.engine,
                cache,
                [token_ids[position] for position in spoken],
                chunk_tokens=chunk_tokens,
                on_progress=partial(self.progress, "repeat"),
                weights=None if weights is None else [weights[position - start] for position in spoken],
            )
            samples.append(repeated)
        if conversations:
            samples.append(self_study_queries(self.engine, cache, conversations, chunk_tokens=chunk_tokens))
        if self.live is not None:
            passed = self.live.after(end)
            if not passed and not samples:
                raise CompactionFailed(
                    f"no query has passed since token {end}, and reference_queries is live alone: read more first, "
                    'compact a smaller fraction, or add "repeat"'
                )
            if passed:
                samples.append(passed)
        return [ReferenceQueries.union(layer) for layer in zip(*samples, strict=True)]
