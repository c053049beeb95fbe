"""Live queries: those of the tokens after a block, kept while these were read or generated. They cost no pass.

They suit a text that only continues. For recall they are useless alone, as measured in docs/benchmarks/recall.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from am_memory.engines.base import SessionLayer
from am_memory.queries.reference import ReferenceQueries

NUM_DISTANCES = 16
"""The number of distances over which live queries are spread."""


class _Pass(NamedTuple):
    """The queries of one forward pass at one layer; `start` is the logical position of its first token."""

    start: int
    query: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens, head_dim)
    log_mass: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.query.shape[2]

    def cut(self, start: int, end: int) -> _Pass:
        """The part for the tokens at [start, end)."""
        if start <= self.start and self.end <= end:
            return self
        start, end = max(start, self.start), min(end, self.end)
        where = slice(start - self.start, max(end, start) - self.start)
        return _Pass(start, self.query[:, :, where], self.log_mass[:, :, where])


class LiveQueries:
    """Keeps the queries of the last tokens that were read or generated.

    Args:
        max_tokens: older ones are dropped. A token's queries take num_key_value_groups times the bytes of its keys.
    """

    def __init__(self, max_tokens: int = 512) -> None:
        self.max_tokens = max_tokens
        self._num_tokens: defaultdict[int, int] = defaultdict(int)
        self._passes: defaultdict[int, list[_Pass]] = defaultdict(list)

    def copy(self) -> LiveQueries:
        """A second one with the same queries, for a branch."""
        twin = LiveQueries(self.max_tokens)
        twin._num_tokens = self._num_tokens.copy()
        twin._passes.update({index: list(passes) for index, passes in self._passes.items()})
        return twin

    def since(self, position: int) -> LiveQueries:
        """A second one with the queries of the tokens at `position` and later only."""
        twin = self.copy()
        for index, passes in twin._passes.items():
            twin._passes[index] = [one.cut(position, one.end) for one in passes if one.end > position]
        return twin

    @property
    def start(self) -> int | None:
        """The position of the first token whose queries are kept; None if there are none."""
        return min((passes[0].start for passes in self._passes.values() if passes), default=None)

    def seek(self, num_tokens: int) -> None:
        """Continue at logical position `num_tokens`; queries from there on are dropped."""
        for index, passes in self._passes.items():
            self._passes[index] = [one.cut(one.start, num_tokens) for one in passes if one.start < num_tokens]
        self._num_tokens = defaultdict(lambda: num_tokens)

    def add(self, index: int, query: Tensor, log_mass: Tensor) -> None:
        """Keep what `OnQuery` gets for compactable layer `index`."""
        new = _Pass(self._num_tokens[index], query.detach(), log_mass.detach())
        oldest = new.end - self.max_tokens
        self._num_tokens[index] = new.end
        kept = [one.cut(oldest, one.end) for one in self._passes[index] if one.end > oldest]
        self._passes[index] = [*kept, new.cut(oldest, new.end)]

    def after(self, position: int) -> list[ReferenceQueries]:
        """For each compactable layer, the queries of the tokens at `position` and later; empty if there are none."""
        layers = []
        for _, passes in sorted(self._passes.items()):
            kept = [one.cut(position, one.end) for one in passes if one.end > position]
            if not kept:
                return []
            layers.append(ReferenceQueries.pooled([(one.query, one.log_mass) for one in kept]))
        return layers


def from_further_away(
    samples: Sequence[ReferenceQueries], layers: Sequence[SessionLayer], num_tokens: int
) -> list[ReferenceQueries]:
    """Live queries rotated to later positions, evenly spread over the next `num_tokens` positions.

    Live queries stood directly behind the block. Later queries will stand further away, and RoPE depends on the
    distance, so slots and fits must serve these. How far is not known; a text may become twice as long as it is.

    Args:
        samples: one for each layer.
        layers: rotate the queries by their own RoPE.
    """
    return [
        ReferenceQueries(_spread(sample.query, layer, num_tokens), sample.log_mass)
        for sample, layer in zip(samples, layers, strict=True)
    ]


def _spread(query: Tensor, layer: SessionLayer, num_tokens: int) -> Tensor:
    spread = torch.empty_like(query)
    for index in range(NUM_DISTANCES):
        distance = num_tokens * (2 * index + 1) // (2 * NUM_DISTANCES)
        spread[:, index::NUM_DISTANCES] = layer.rotated(query[:, index::NUM_DISTANCES], distance)
    return spread
