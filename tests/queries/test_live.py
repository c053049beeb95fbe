"""Live queries: kept as they pass, forgotten when they are old or taken back."""

from __future__ import annotations

import torch

from am_memory.queries import LiveQueries


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
