"""Which cache a prompt goes on from, and which caches are evicted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from am_memory.conversations.prefix_pool import Match, PrefixPool


@dataclass(frozen=True)
class Text:
    """A text with a pretended cache of one byte for each character."""

    text: str
    can_go_back: bool = True

    @property
    def kv_bytes(self) -> int:
        return len(self.text)

    def is_prefix_of(self, other: Text) -> bool:
        return other.text.startswith(self.text)


def pool_of(*texts: str, max_bytes: int = 100, max_entries: int = 100) -> PrefixPool[Text]:
    pool = PrefixPool[Text](max_bytes=max_bytes, max_entries=max_entries)
    for text in texts:
        pool.put(text, Text(text))
    return pool


def longest(pool: PrefixPool[Text], prompt: str, above: int = 0) -> Match[Text]:
    def num_shared(entry: Text) -> int:
        return next(size for size in range(len(prompt), -1, -1) if entry.text.startswith(prompt[:size]))

    return pool.longest(num_shared, lambda entry, count: entry.can_go_back, above=above)


def test_the_cache_that_shares_most_is_found() -> None:
    assert longest(pool_of("owl", "owls", "otter"), "owls sleep") == Match(Text("owls"), 4, 4)


def test_a_cache_that_shares_no_more_than_the_least_is_not_worth_it() -> None:
    assert longest(pool_of("owl"), "owls", above=3) == Match(None, 0, 3)


def test_a_cache_that_cannot_go_back_is_passed_over_and_reported() -> None:
    pool = pool_of("ow")
    pool.put("owls", Text("owls", can_go_back=False))
    assert longest(pool, "owls sleep") == Match(Text("ow"), 2, 4)


def test_finding_a_cache_is_a_use_of_it() -> None:
    pool = pool_of("owl", "mouse", max_entries=1)
    longest(pool, "owl")
    assert pool.evict("new") == ["mouse"]


@pytest.mark.parametrize(("limits", "evicted"), [({"max_entries": 2}, ["a"]), ({"max_bytes": 5}, ["a", "bb"])])
def test_the_least_recently_used_are_evicted_until_the_rest_fits(limits: dict[str, int], evicted: list[str]) -> None:
    assert pool_of("a", "bb", "cccc", **limits).evict("cccc") == evicted


def test_a_superseded_cache_is_evicted_before_an_older_one() -> None:
    assert pool_of("old", "owl", "owls", max_entries=2).evict("owls") == ["owl"]


def test_the_newest_cache_stays_however_large_it_is() -> None:
    pool = pool_of("a", "much too large", max_bytes=3)
    assert pool.evict("much too large") == ["a"]
    assert [entry.text for entry in pool.entries] == ["much too large"]
