"""Live queries: those that passed anyway, while the tokens after a block were read or written. No pass of their own.

Right for a text that only goes on; measured to be useless alone for recall.
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
"""Positions from which live queries are asked once more, at most."""


class _Pass(NamedTuple):
    """What one forward pass left at one layer; `start` is the logical position of its first token."""

    start: int
    query: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens, head_dim)
    log_mass: Tensor  # (num_key_value_heads, num_key_value_groups, num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.query.shape[2]

    def cut(self, start: int, end: int) -> _Pass:
        """The tokens at [start, end) of it."""
        start, end = max(start, self.start), min(end, self.end)
        where = slice(start - self.start, max(end, start) - self.start)
        return _Pass(start, self.query[:, :, where], self.log_mass[:, :, where])


class LiveQueries:
    """Keeps the queries of the last tokens, as they come.

    Args:
        max_tokens: older ones are forgotten; a token's queries take num_key_value_groups times the bytes of its keys.
    """

    def __init__(self, max_tokens: int = 512) -> None:
        self.max_tokens = max_tokens
        self._num_tokens: defaultdict[int, int] = defaultdict(int)
        self._passes: defaultdict[int, list[_Pass]] = defaultdict(list)

    def copy(self) -> LiveQueries:
        """The same queries, for a branch that goes its own way."""
        twin = LiveQueries(self.max_tokens)
        twin._num_tokens = self._num_tokens.copy()
        twin._passes.update({index: list(passes) for index, passes in self._passes.items()})
        return twin

    def since(self, position: int) -> LiveQueries:
        """Those of the tokens at `position` and later, for whoever is to know of no others."""
        twin = self.copy()
        for index, passes in twin._passes.items():
            twin._passes[index] = [each.cut(position, each.end) for each in passes if each.end > position]
        return twin

    @property
    def start(self) -> int | None:
        """The position of the first token whose queries are kept; None where there are none."""
        return min((passes[0].start for passes in self._passes.values() if passes), default=None)

    def seek(self, num_tokens: int) -> None:
        """The next token read is at logical position `num_tokens`; queries of later ones are forgotten."""
        for index, passes in self._passes.items():
            self._passes[index] = [each.cut(each.start, num_tokens) for each in passes if each.start < num_tokens]
        self._num_tokens = defaultdict(lambda: num_tokens)

    def add(self, index: int, query: Tensor, log_mass: Tensor) -> None:
        """Take what `OnQuery` gets, for compactable layer `index`."""
        new = _Pass(self._num_tokens[index], query.detach(), log_mass.detach())
        oldest = new.end - self.max_tokens
        self._num_tokens[index] = new.end
        kept = [each.cut(oldest, each.end) for each in self._passes[index] if each.end > oldest]
        self._passes[index] = [*kept, new.cut(oldest, new.end)]

    def after(self, position: int) -> list[ReferenceQueries]:
        """For each layer the queries of the tokens at `position` and later; empty if there are none."""
        layers = []
        for _, passes in sorted(self._passes.items()):
            kept = [each.cut(position, each.end) for each in passes if each.end > position]
            if not kept:
                return []
            layers.append(ReferenceQueries.pooled([(each.query, each.log_mass) for each in kept]))
        return layers


def from_further_away(
    samples: Sequence[ReferenceQueries], layers: Sequence[SessionLayer], num_tokens: int
) -> list[ReferenceQueries]:
    """Live queries as if they came later, evenly spread over the next `num_tokens` positions.

    What has passed stood right behind the block, and looked at the end of it. Whoever looks there as long as the block
    is remembered does so from further and further away, as RoPE has it: slots and fits are to serve these. How far is
    not known; a text that was so long may become as long again.

    Args:
        samples: of each layer.
        layers: know how their queries turn.
    """
    return [
        ReferenceQueries(_spread(sample.query, layer, num_tokens), sample.log_mass)
        for sample, layer in zip(samples, layers, strict=True)
    ]


def _spread(query: Tensor, layer: SessionLayer, num_tokens: int) -> Tensor:
    spread = torch.empty_like(query)
    for index in range(NUM_DISTANCES):
        distance = num_tokens * (2 * index + 1) // (2 * NUM_DISTANCES)
        spread[:, index::NUM_DISTANCES] = layer.turned(query[:, index::NUM_DISTANCES], distance)
    return spread
