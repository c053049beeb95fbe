"""Reference queries: the sample of queries on which a compaction is fitted, and how much each of them saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReferenceQueries:
    """The sample for one layer (arXiv:2602.16284, section 3); a group's query heads are pooled along num_queries.

    Attributes:
        query: (num_key_value_heads, num_queries, head_dim), after RoPE.
        log_mass: (num_key_value_heads, num_queries) float32, log of the mass that each query spent on everything that
            it saw. Its share on a block says how much an error in that block matters to it.
    """

    query: Tensor
    log_mass: Tensor

    @classmethod
    def pooled(
        cls, passes: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float] | None = None
    ) -> ReferenceQueries:
        """From what `OnQuery` got in several forward passes.

        Args:
            weights: how much the queries of each token count; None: all alike. A query that saw more elsewhere has a
                smaller share on the block, and so counts less: that is how a weight is told.
        """
        query = torch.cat([query for query, _ in passes], dim=2)
        log_mass = torch.cat([log_mass for _, log_mass in passes], dim=2)
        if weights is not None:
            log_mass = log_mass - torch.tensor(weights, device=log_mass.device).log()
        return cls(query.flatten(1, 2), log_mass.flatten(1, 2))

    @classmethod
    def union(cls, samples: Sequence[ReferenceQueries]) -> ReferenceQueries:
        """All queries of several samples."""
        return cls(
            torch.cat([sample.query for sample in samples], dim=1),
            torch.cat([sample.log_mass for sample in samples], dim=1),
        )
