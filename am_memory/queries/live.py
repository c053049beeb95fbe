"""Live queries: those that passed anyway, while the tokens after a block were read or written. No pass of their own.

Right for plain continuation; measured to be useless alone for recall.
"""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from torch import Tensor


class LiveQueries:
    """Keeps the queries of the last `max_tokens` tokens, as they come.

    Args:
        max_tokens: older ones are forgotten; a token's queries take num_key_value_groups times the bytes of its keys.
    """

    def __init__(self, max_tokens: int = 512) -> None:
        self.max_tokens = max_tokens
        self._chunks: dict[int, deque[tuple[int, Tensor]]] = defaultdict(deque)
        self._num_seen: dict[int, int] = defaultdict(int)

    def copy(self) -> LiveQueries:
        """The same queries, for a branch that goes its own way."""
        twin = LiveQueries(self.max_tokens)
        twin._chunks.update({index: deque(chunks) for index, chunks in self._chunks.items()})
        twin._num_seen.update(self._num_seen)
        return twin

    def seek(self, num_tokens: int) -> None:
        """The next token read is at logical position `num_tokens`; queries of later ones are forgotten."""
        for index, chunks in self._chunks.items():
            kept = [(start, query[:, :, : num_tokens - start]) for start, query in chunks if start < num_tokens]
            self._chunks[index] = deque(kept)
        self._num_seen = defaultdict(lambda: num_tokens)

    def add(self, index: int, query: Tensor) -> None:
        """Take (num_key_value_heads, num_key_value_groups, num_tokens, head_dim) of compactable layer `index`."""
        chunks, start = self._chunks[index], self._num_seen[index]
        chunks.append((start, query.detach()[:, :, -self.max_tokens :].clone()))
        chunks[-1] = (start + query.shape[2] - chunks[-1][1].shape[2], chunks[-1][1])
        self._num_seen[index] = start + query.shape[2]
        while len(chunks) > 1 and chunks[1][0] <= self._num_seen[index] - self.max_tokens:
            chunks.popleft()

    def after(self, position: int) -> list[Tensor]:
        """For each layer the queries of the tokens at `position` and later; empty if there are none."""
        layers = []
        for index in sorted(self._chunks):
            kept = [query[:, :, max(position - start, 0) :] for start, query in self._chunks[index]]
            kept = [query for query in kept if query.shape[2]]
            if not kept:
                return []
            layers.append(torch.cat(kept, dim=2).flatten(1, 2))
        return layers
