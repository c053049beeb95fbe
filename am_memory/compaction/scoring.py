"""Scores and ranks: how much attention each key of a segment gets, and which head gets the next slot.

Reads a segment's entries from the cache. Does not fit slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.budgets import Calibration, head_ranks
from am_memory.engines.base import SessionLayer
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import MemoryPolicy
from am_memory.queries import ReferenceQueries
from am_memory.solver import Block, ExactAttention, exact_attention


@dataclass(frozen=True)
class LayerEntries:
    """One layer's keys and values for the tokens of a segment.

    A segment that is compacted again has slots as well as exact entries; the slots come first.

    Attributes:
        key, value: (num_key_value_heads, seq_len, head_dim or value_dim).
        bias: (num_key_value_heads, seq_len); -inf pads a head that has fewer slots. None: all entries are exact.
        positions: (num_key_value_heads, seq_len) int32, logical positions, in host memory.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None
    positions: Tensor

    @classmethod
    def read(cls, layer: SessionLayer, segment: Segment) -> LayerEntries:
        """Take the segment's entries from a layer of the cache."""
        start = max(segment.start, layer.start)
        key, value = layer.exact_entries(start, segment.end)
        positions = torch.arange(start, segment.end, dtype=torch.int32).expand(key.shape[0], -1)
        exact = cls(key, value, None, positions)
        return exact if segment.start >= layer.start else exact._behind(layer.slots, segment)

    def _behind(self, slots: Slots | None, segment: Segment) -> LayerEntries:
        """These entries with the segment's slots before them, padded to the head that has the most."""
        assert slots is not None
        key, value, bias, positions = slots.within(segment.start, segment.end).padded()
        return LayerEntries(
            torch.cat([key, self.key], dim=1),
            torch.cat([value, self.value], dim=1),
            torch.cat([bias, self.key.new_zeros(self.key.shape[:2])], dim=1),
            torch.cat([positions, self.positions], dim=1),
        )


@dataclass(frozen=True, eq=False)
class ScoredHead:
    """One KV head's entries of a segment, with what its fit needs.

    Attributes:
        layer: index among the compactable layers.
        block, exact: of this head alone (a batch of 1).
        positions: (seq_len,) int32 in host memory, logical positions of the block's keys.
        ranks: (seq_len,) int64 in host memory; entry k is the rank of the head's k-th slot among those of all heads.
        rotations: (num_distances, head_dim, head_dim) of the layer, if biases must be folded into the keys; else None.
    """

    layer: int
    block: Block
    exact: ExactAttention
    positions: Tensor
    ranks: Tensor
    rotations: Tensor | None = None


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's entries of a segment, and the attention that the reference queries spend on them.

    Attributes:
        index: among the compactable layers.
        positions: (num_key_value_heads, seq_len) int32 in host memory, logical positions of the block's keys.
        rotations: (num_distances, head_dim, head_dim), if biases must be folded into the keys; else None.
    """

    index: int
    block: Block
    exact: ExactAttention
    positions: Tensor
    rotations: Tensor | None

    @classmethod
    def of(cls, index: int, layer: SessionLayer, entries: LayerEntries, queries: ReferenceQueries) -> ScoredLayer:
        """Attend to a layer's entries with the queries that came to this layer."""
        scaling = float(layer.scaling or 0)
        given = queries.query, entries.key, entries.value, scaling, queries.log_mass, entries.bias
        block = Block(*given, softcap=layer.softcap)
        return cls(index, block, exact_attention(block), entries.positions, layer.query_rotations)

    def heads(self, ranks: Tensor) -> list[ScoredHead]:
        """Split into heads.

        Args:
            ranks: (num_key_value_heads, seq_len) int64, this layer's part of what `slot_ranks` returns.
        """
        return [
            ScoredHead(
                self.index,
                self.block.head(head),
                self.exact.head(head),
                self.positions[head],
                ranks[head],
                self.rotations,
            )
            for head in range(self.block.num_heads)
        ]


def slot_ranks(
    scores: Sequence[Tensor], policy: MemoryPolicy, calibration: Calibration | None = None, *, is_shared: bool = False
) -> tuple[Tensor, ...]:
    """Rank the slots of all heads of all layers, by the policy's head budget.

    Args:
        scores: one (num_key_value_heads, seq_len) tensor for each layer.
        calibration: sensitivity curves of the model, if the budget uses them.
        is_shared: every slot is shared by all heads, so that no head can have more than another.

    Returns:
        For each layer (num_key_value_heads, seq_len) int64 in host memory; entry [h, k] is the rank of the k-th slot
        of head h. A segment of n slots holds the slots of rank < n.
    """
    longest = max(layer_scores.shape[1] for layer_scores in scores)
    padded = [torch.nn.functional.pad(layer_scores, (0, longest - layer_scores.shape[1])) for layer_scores in scores]
    ranks = head_ranks(torch.cat(padded), policy, calibration, is_shared=is_shared)
    by_layer = torch.split(ranks.cpu(), [len(layer_scores) for layer_scores in scores])
    return tuple(
        layer_ranks[:, : layer_scores.shape[1]] for layer_ranks, layer_scores in zip(by_layer, scores, strict=True)
    )
