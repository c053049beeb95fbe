"""Predicted queries: those of a repeat, from the keys that the cache holds. They cost no forward pass.

Does not know how the maps are measured, nor how the queries are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from am_memory.engines.base import SessionCache
from am_memory.queries.query_maps import QueryMap
from am_memory.queries.reference import ReferenceQueries
from am_memory.queries.total_mass import total_log_mass


def predicted_queries(
    maps: Sequence[QueryMap],
    cache: SessionCache,
    positions: Sequence[int],
    *,
    num_before: int,
    on_progress: Callable[[int, int], None],
    weights: Sequence[float] | None = None,
) -> list[ReferenceQueries]:
    """The queries of some tokens, as if the model repeated them.

    Args:
        maps: one for each compactable layer.
        cache: holds the tokens exact; it is only read.
        positions: where they stand, rising.
        num_before: tokens of the request that would come before the repeated ones.
        on_progress: called with (layers done, layers).
        weights: how much each token's queries count; None: all alike.

    Returns:
        For each compactable layer num_key_value_groups * len(positions) queries.
    """
    where, num_tokens, samples = torch.tensor(positions), cache.num_tokens, list[ReferenceQueries]()
    for layer, query_map in zip(cache.compactable, maps, strict=True):
        query = query_map.queries(layer, where, num_tokens, num_tokens + num_before)
        log_mass = total_log_mass(layer, num_tokens, query.flatten(1, 2), positions[-1] + 1).view(query.shape[:3])
        more = query_map.log_mass.to(log_mass.device)[:, :, None]
        samples.append(ReferenceQueries.pooled([(query, log_mass + more)], weights))
        on_progress(len(samples), len(maps))
    return samples
