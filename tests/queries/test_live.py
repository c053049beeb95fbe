"""Live queries: kept as they pass, forgotten when they are old or taken back; asked from further away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from am_memory.engines.transformers import TransformersEngine
from am_memory.policy import MemoryPolicy
from am_memory.queries import LiveQueries, Passage, QuerySources, ReferenceQueries
from am_memory.queries.live import NUM_DISTANCES, from_further_away

NUM_TOKENS = 40
"""Of the text."""


def passed(*sizes: int, max_tokens: int = 100) -> LiveQueries:
    """Queries whose every number is their logical position, in passes of the given sizes."""
    live, start = LiveQueries(max_tokens), 0
    for size in sizes:
        query = torch.arange(start, start + size, dtype=torch.float32).view(1, 1, -1, 1).expand(2, 3, size, 4)
        live.add(0, query, query[..., 0])
        start += size
    return live


def positions(live: LiveQueries, after: int) -> list[int]:
    samples = live.after(after)
    return sorted({int(value) for value in samples[0].query.flatten()}) if samples else []


def test_only_queries_after_a_position_are_given() -> None:
    assert positions(passed(10, 1, 1, 20), after=11) == list(range(11, 32))


def test_a_groups_heads_are_pooled() -> None:
    (sample,) = passed(10).after(4)
    assert tuple(sample.query.shape) == (2, 3 * 6, 4)
    assert tuple(sample.log_mass.shape) == (2, 3 * 6)


def test_the_oldest_are_forgotten() -> None:
    assert positions(passed(60, 60, 1, max_tokens=50), after=0)[-50:] == list(range(71, 121))
    assert len(positions(passed(*[1] * 300, max_tokens=50), after=0)) == 50


def test_there_are_none_after_the_last_token() -> None:
    assert positions(passed(10), after=10) == []


def test_queries_of_tokens_that_are_taken_back_are_forgotten() -> None:
    live = passed(10, 10)
    live.seek(15)
    assert positions(live, after=0) == list(range(15))
    query = torch.full((2, 3, 1, 4), 15.0)
    live.add(0, query, query[..., 0])
    assert positions(live, after=14) == [14, 15]


def test_a_copy_goes_its_own_way() -> None:
    live = passed(10)
    twin = live.copy()
    twin.add(0, torch.full((2, 3, 1, 4), 10.0), torch.zeros(2, 3, 1))
    assert positions(live, after=0) == list(range(10))
    assert positions(twin, after=0) == list(range(11))


# From further away


class Moving:
    """A layer whose keys and queries are positions."""

    def rotated(self, key: Tensor, distance: int) -> Tensor:
        return key + distance


def test_queries_are_spread_evenly_over_the_positions_to_come() -> None:
    sample = ReferenceQueries(torch.zeros(2, 96, 4), torch.rand(2, 96))
    (spread,) = from_further_away([sample], [Moving()], 1600)
    assert sorted(spread.query[0, :, 0].tolist()) == sorted([50 + 100 * index for index in range(NUM_DISTANCES)] * 6)
    assert torch.equal(spread.query, spread.query[:1, :, :1].expand(2, -1, 4))
    assert spread.log_mass is sample.log_mass


def test_a_few_queries_are_as_well() -> None:
    sample = ReferenceQueries(torch.zeros(1, 3, 4), torch.zeros(1, 3))
    (spread,) = from_further_away([sample], [Moving()], 1600)
    assert spread.query[0, :, 0].tolist() == [50, 150, 250]


def live_sample(engine: TransformersEngine) -> tuple[list[ReferenceQueries], list[ReferenceQueries]]:
    """What passed after a block of 20 tokens, and what a compaction of the block gets of it."""
    live, cache, token_ids = LiveQueries(), engine.new_cache(), list(range(30, 30 + NUM_TOKENS))
    engine.forward(cache, token_ids, on_query=live.add)
    sources = QuerySources(engine, MemoryPolicy(reference_queries=("live",)), live, lambda *_: None)
    return live.after(20), sources.sample(Passage(cache, token_ids, 0, 20, None, ()))


def test_a_compaction_gets_them_from_as_far_again_as_the_text_is_long(engine: TransformersEngine) -> None:
    passed_queries, sample = live_sample(engine)
    for layer, before, after in zip(engine.new_cache().compactable, passed_queries, sample, strict=True):
        assert torch.equal(after.log_mass, before.log_mass)
        last = NUM_DISTANCES - 1
        expected = layer.rotated(before.query[:, last : last + 1], NUM_TOKENS * (2 * last + 1) // (2 * NUM_DISTANCES))
        torch.testing.assert_close(after.query[:, last : last + 1], expected)
        assert not torch.equal(after.query, before.query)


def test_where_keys_cannot_be_turned_they_are_as_they_passed(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "capabilities", replace(engine.capabilities, can_rotate_keys=False))
    passed_queries, sample = live_sample(engine)
    assert all(torch.equal(before.query, after.query) for before, after in zip(passed_queries, sample, strict=True))
