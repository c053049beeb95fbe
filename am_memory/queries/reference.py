"""Reference queries: the sample that a compaction is fitted on, and each query's total attention mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceQueries:
    """The sample for one layer (arXiv:2602.16284, section 3). The query heads of a GQA group are pooled.

    Attributes:
        query: (num_key_value_heads, num_queries, head_dim), after RoPE.
        log_mass: (num_key_value_heads, num_queries) float32, log of each query's attention mass over all keys that it
            saw. The block's share of this mass says how much an error in the block matters to the query.
    """

    query: Tensor
    log_mass: Tensor

    @classmethod
    def pooled(
        cls, passes: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None
    ) -> ReferenceQueries:
        """Pool what `OnQuery` got in several forward passes.

        Args:
            passes: (query, log_mass) of each pass; see `OnQuery` for the shapes.
            weights: how much the queries of each token count; None: all alike. A weight below 1 is written as a larger
                total mass: the block's share becomes smaller, and the query counts less.
        """
        query = torch.cat([query for query, _ in passes], dim=2)
        log_mass = torch.cat([log_mass for _, log_mass in passes], dim=2)
        if weights is not None:
            log_mass = log_mass - torch.tensor(weights, device=log_mass.device).log()
        return cls(query.flatten(1, 2), log_mass.flatten(1, 2))

    @classmethod
    def union(cls, samples: Sequence[ReferenceQueries]) -> ReferenceQueries:
        """Join the queries of several samples."""
        return cls(
            torch.cat([sample.query for sample in samples], dim=1),
            torch.cat([sample.log_mass for sample in samples], dim=1),
        )
