"""What every solver step works on: one block of the cache, its reference queries, and the walk over them.

Knows no model, no cache and no policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.errors import InvalidInput

# Exponentials are taken in base 2, as flash-attention kernels do: on a CPU torch.exp2 is twice as fast as torch.exp,
# and does not become ten times slower where the result underflows, as it does for most keys of a peaked softmax.
LOG2_E = math.log2(math.e)

# Elements of the largest (num_heads, chunk of queries, num_keys) tensor held at once. The several passes over a chunk
# should stay in a CPU's cache (4 MiB of float32); an accelerator wants few large kernels.
MAX_CHUNK_ELEMENTS_CPU = 2**20
MAX_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Block:
    """One block of the cache, seen by B KV heads (heads of one layer, or of several layers).

    Attributes:
        query: (B, num_queries, head_dim), reference queries after RoPE; the query heads of a GQA group are pooled
            along num_queries.
        key: (B, seq_len, head_dim), after RoPE.
        value: (B, seq_len, head_dim).
        scaling: factor of the logits before the softmax.

    Any floating dtype; the solver computes in float32, and in float64 where it factors.

    Raises:
        InvalidInput: shapes that do not fit together, or no key, or no query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.key.ndim != 3 or self.value.shape != self.key.shape:
            raise InvalidInput(
                f"key {tuple(self.key.shape)} and value {tuple(self.value.shape)} must both be "
                "(num_heads, seq_len, head_dim)"
            )
        num_heads, seq_len, head_dim = self.key.shape
        if self.query.ndim != 3 or (self.query.shape[0], self.query.shape[2]) != (num_heads, head_dim):
            raise InvalidInput(
                f"query {tuple(self.query.shape)} must be ({num_heads}, num_queries, {head_dim}), as the keys are"
            )
        if seq_len == 0 or self.num_queries == 0:
            raise InvalidInput(
                f"a block of {seq_len} keys and {self.num_queries} queries has nothing to match: "
                "give at least one of each"
            )

    @property
    def num_heads(self) -> int:
        return self.key.shape[0]

    @property
    def num_queries(self) -> int:
        return self.query.shape[1]

    @property
    def seq_len(self) -> int:
        return self.key.shape[1]

    @property
    def head_dim(self) -> int:
        return self.key.shape[2]

    def query_chunks(self, num_keys: int) -> Iterator[tuple[slice, Tensor]]:
        """The queries, (B, chunk, head_dim) float32 at a time, so that (B, chunk, num_keys) stays bounded."""
        limit = MAX_CHUNK_ELEMENTS_CPU if self.query.device.type == "cpu" else MAX_CHUNK_ELEMENTS
        chunk = max(1, limit // (self.num_heads * max(1, num_keys)))
        for start in range(0, self.num_queries, chunk):
            rows = slice(start, min(start + chunk, self.num_queries))
            yield rows, self.query[:, rows].float()

    def base2_key(self, key: Tensor) -> Tensor:
        """(B, head_dim, t) float32: the matrix that turns queries into their base-2 logits on (B, t, head_dim) keys."""
        return key.float().transpose(1, 2) * (self.scaling * LOG2_E)


def slot_mask(num_slots: Tensor, max_slots: int) -> Tensor:
    """(B, max_slots) bool: True where row b has a slot, False in its padding."""
    return torch.arange(max_slots, device=num_slots.device) < num_slots[:, None]
