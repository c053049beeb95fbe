"""Exact entries of compacted tokens: any range of tokens can be read from the originals that hold it."""

from __future__ import annotations

import pytest
import torch

from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import KeysAndValues, Original, Place, between, cut

PLACES: list[Place] = ["host", "disk"]
NUM_TOKENS = 40


def some_entries() -> list[KeysAndValues]:
    """Keys and values of all tokens in two layers of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, NUM_TOKENS, size, generator=generator), torch.randn(2, NUM_TOKENS, size, generator=generator))
        for size in (8, 4)
    ]


def kept(entries: list[KeysAndValues], spans: list[tuple[int, int]], place: Place) -> list[Original]:
    store = OriginalStore()
    return [original for span in spans for original in store.keep(*span, cut(entries, *span), place)]


def assert_same(entries: list[KeysAndValues] | None, expected: list[KeysAndValues]) -> None:
    assert entries is not None
    for layer, expected_layer in zip(entries, expected, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(layer, expected_layer, strict=True))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("span", [(4, 40), (4, 10), (10, 25), (5, 6), (11, 14), (9, 11), (7, 30), (39, 40)])
def test_any_range_within_consecutive_originals_can_be_read(place: Place, span: tuple[int, int]) -> None:
    entries = some_entries()
    originals = kept(entries, [(4, 10), (10, 25), (25, 40)], place)
    assert_same(between(originals, *span), cut(entries, *span))


@pytest.mark.parametrize("span", [(0, 5), (3, 4), (9, 13), (9, 11), (11, 21), (39, 41), (0, 41)])
def test_a_range_with_a_token_that_no_original_holds_is_not_there(span: tuple[int, int]) -> None:
    assert between(kept(some_entries(), [(4, 10), (12, 20), (20, 40)], "host"), *span) is None


@pytest.mark.parametrize("place", PLACES)
def test_a_part_of_an_original_can_be_read(place: Place) -> None:
    entries = some_entries()
    (original,) = kept(entries, [(4, 40)], place)
    for start, end in [(None, None), (6, None), (None, 9), (17, 18)]:
        assert_same(original.layers(start, end), cut(entries, start or 4, end or 40))
