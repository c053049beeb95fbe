"""The input of every solver step: one block of the cache and its reference queries.

Knows no model, no cache and no policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.errors import InvalidInput

LOG2_E = math.log2(math.e)
"""Turns logits into base 2, as in flash-attention kernels. On a CPU torch.exp2 is twice as fast as torch.exp, and it
does not become ten times slower where the result underflows, as it does for most keys of a peaked softmax."""

MAX_CHUNK_ELEMENTS_CPU, MAX_CHUNK_ELEMENTS = 2**20, 2**24
"""Elements of the largest (num_heads, chunk of queries, num_keys) tensor held at once. On a CPU the passes over a chunk
stay in its cache (4 MiB of float32); a GPU works best with few large kernels."""


@dataclass(frozen=True)
class Block:
    """One block of the cache, seen by B KV heads (heads of one layer, or of several layers).

    Attributes:
        query: (B, num_queries, head_dim), reference queries after RoPE; the query heads of a GQA group are pooled
            along num_queries.
        key: (B, seq_len, head_dim), after RoPE.
        value: (B, seq_len, value_dim).
        scaling: factor of the logits before the softmax.
        log_mass: (B, num_queries) float32, log of each query's attention mass over all keys that it sees, in this block
            and elsewhere. A query then counts by its share on this block. None: all queries count alike.
        key_bias: (B, seq_len), added to the logits, for keys that are themselves compact slots. -inf marks padding,
            so that heads of different lengths can share a block. None: 0.
        softcap: a scaled logit s is softcap * tanh(s / softcap) before a bias is added. None: it is s.

    Tensors may have any floating dtype. The solver computes in float32, and factors matrices in float64.

    Raises:
        InvalidInput: shapes that do not fit together, or no key, or no query.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    log_mass: Tensor | None = None
    key_bias: Tensor | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.key.ndim != 3 or self.value.ndim != 3 or self.value.shape[:2] != self.key.shape[:2]:
            raise InvalidInput(
                f"key {tuple(self.key.shape)} and value {tuple(self.value.shape)} must be (num_heads, seq_len, "
                "head_dim) and (num_heads, seq_len, value_dim)"
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

    def head(self, index: int) -> Block:
        """One head, as views."""
        query, key, value = (tensor[index, None] for tensor in (self.query, self.key, self.value))
        log_mass = None if self.log_mass is None else self.log_mass[index, None]
        key_bias = None if self.key_bias is None else self.key_bias[index, None]
        return Block(query, key, value, self.scaling, log_mass, key_bias, self.softcap)

    def queries(self, where: Tensor) -> Block:
        """The same keys, seen by some of the queries; where: int64 indices of them."""
        log_mass = None if self.log_mass is None else self.log_mass[:, where]
        return Block(self.query[:, where], self.key, self.value, self.scaling, log_mass, self.key_bias, self.softcap)

    @classmethod
    def stack(cls, blocks: Sequence[Block]) -> Block:
        """The heads of several blocks of equal shapes, scaling and options."""
        log_mass, key_bias = (
            None if tensors[0] is None else torch.cat(tensors)  # type: ignore[arg-type]
            for tensors in ([block.log_mass for block in blocks], [block.key_bias for block in blocks])
        )
        query, key, value = (
            torch.cat(tensors)
            for tensors in zip(*((block.query, block.key, block.value) for block in blocks), strict=True)
        )
        return cls(query, key, value, blocks[0].scaling, log_mass, key_bias, blocks[0].softcap)

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

    @property
    def value_dim(self) -> int:
        return self.value.shape[2]

    @property
    def num_keys(self) -> Tensor:
        """(B,) int64: the number of keys of each head, without padding."""
        if self.key_bias is None:
            return torch.full((self.num_heads,), self.seq_len, device=self.key.device)
        return (self.key_bias > -torch.inf).sum(dim=1)

    def base2_logits(self, key: Tensor, bias: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Scaled and capped logits of the queries on some keys, times log2(e), a chunk of queries at a time.

        Args:
            key: (B, t, head_dim), any dtype.
            bias: (B, t), added to the logits; None: 0.

        Yields:
            rows: the chunk of queries.
            logits: (B, chunk, t) float32. All chunks share one buffer, which the consumer may overwrite: fresh memory
                for each chunk would cost a third of the matmul's time.
        """
        base2_key = key.float().mT * (self.scaling * LOG2_E)  # (B, head_dim, t)
        base2_bias = None if bias is None else bias[:, None].float() * LOG2_E
        limit = MAX_CHUNK_ELEMENTS_CPU if key.device.type == "cpu" else MAX_CHUNK_ELEMENTS
        chunk = min(self.num_queries, max(1, limit // (self.num_heads * max(1, key.shape[1]))))
        buffer = base2_key.new_empty(self.num_heads, chunk, key.shape[1])
        for start in range(0, self.num_queries, chunk):
            rows = slice(start, min(start + chunk, self.num_queries))
            query = self.query[:, rows].float()
            logits = torch.bmm(query, base2_key, out=buffer[:, : query.shape[1]])
            if self.softcap is not None:
                cap = self.softcap * LOG2_E
                logits.div_(cap).tanh_().mul_(cap)
            yield rows, logits if base2_bias is None else logits.add_(base2_bias)


def slot_mask(num_slots: Tensor, max_slots: int) -> Tensor:
    """(B, max_slots) bool: True where row b has a slot, False in its padding."""
    return torch.arange(max_slots, device=num_slots.device) < num_slots[:, None]
