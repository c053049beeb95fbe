"""Turns between names, whatever each of them has."""

from __future__ import annotations

from collections import Counter

from am_memory.session.turns import Turns


def test_turns_are_taken_between_owners_then_between_their_conversations() -> None:
    """An owner with many prompts gets no more of the reading than an owner with one."""
    turns, items = Turns(), [f"a/1/{number}" for number in range(8)] + ["a/2/0", "b/1/0"]
    keys = [tuple(item.split("/")[:2]) for item in items]
    taken = Counter(turns.next(items, keys) for _ in range(40))
    assert taken["b/1/0"] == 20
    assert taken["a/2/0"] == 10
    assert max(taken[item] for item in items[:8]) - min(taken[item] for item in items[:8]) <= 1


def test_a_new_name_is_the_next_and_keeps_nobody_waiting() -> None:
    turns, items = Turns(), ["old", "other"]
    assert [turns.next(items, [(item,) for item in items]) for _ in range(3)] == ["old", "other", "old"]
    taken = [turns.next([*items, f"new {number}"], [("old",), ("other",), (f"new {number}",)]) for number in range(2)]
    assert taken == ["new 0", "new 1"]
    assert turns.next(items, [("old",), ("other",)]) == "other"


def test_without_keys_each_has_its_turn() -> None:
    turns, items = Turns(), ["a", "b", "c"]
    assert [turns.next(items, [()] * 3) for _ in range(6)] == items * 2
