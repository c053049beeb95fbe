"""Plain prompts, call after call: which tokens are read again, which texts are kept, and for whom."""

from __future__ import annotations

import pytest

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.conversations.texts import Texts, TextTurn
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput

POLICY = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=64)


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


def begun(texts: Texts, prompt: str | list[int], *, owner: str = "") -> TextTurn:
    """A turn that has read its prompt."""
    turn = texts.start(texts.encode(prompt), owner=owner)
    turn.encode()
    for _ in turn.read():
        pass
    return turn


def finished(texts: Texts, turn: TextTurn, num_tokens: int = 4) -> list[int]:
    pieces = list(turn.session.generate(num_tokens, Sampling()))
    texts.keep(turn)
    return [token_id for piece in pieces for token_id in piece.token_ids]


def test_a_prompt_that_goes_on_is_read_from_where_it_was_known(memory: Memory) -> None:
    texts = Texts(memory, max_bytes=10**9)
    finished(texts, begun(texts, "once upon a time"))
    assert begun(texts, "once upon a time").num_cached_tokens == len("once upon a tim")
    assert begun(texts, "once upon another").num_cached_tokens == len("once upon a")
    assert begun(texts, "twice").num_cached_tokens == 0


def test_what_is_known_changes_nothing_in_the_answer(memory: Memory) -> None:
    texts = Texts(memory, max_bytes=10**9)
    finished(texts, begun(texts, "a story of the sea, and "))
    known = begun(texts, "a story of the sea, and of ships")
    assert known.num_cached_tokens > 0
    fresh = Texts(memory, max_bytes=10**9)
    assert finished(texts, known, 8) == finished(fresh, begun(fresh, "a story of the sea, and of ships"), 8)


def test_a_prompt_that_leaves_a_compacted_one_is_read_afresh(memory: Memory) -> None:
    texts = Texts(memory, max_bytes=10**9)
    long = "a prompt that is longer than the cache, and so is compacted as it is read; " * 3
    turn = begun(texts, long)
    finished(texts, turn)
    assert turn.session.stats.num_compactions > 0
    assert begun(texts, long[:100] + "?").num_cached_tokens == 0
    assert begun(texts, [*turn.session.tokens, 65]).num_cached_tokens > len(long)


def test_nothing_is_known_of_another_owners_text(memory: Memory) -> None:
    texts = Texts(memory, max_bytes=10**9)
    finished(texts, begun(texts, "a secret", owner="ada"))
    assert begun(texts, "a secret", owner="ada").num_cached_tokens > 0
    assert begun(texts, "a secret", owner="bob").num_cached_tokens == 0


def test_what_is_kept_is_bounded_in_number_and_bytes(memory: Memory) -> None:
    for texts, num_kept in ((Texts(memory, max_bytes=10**9, max_texts=2), 2), (Texts(memory, max_bytes=1), 1)):
        for text in ("one", "two", "six"):
            finished(texts, begun(texts, text))
        assert sum(begun(texts, text).num_cached_tokens > 0 for text in ("one", "two", "six")) <= num_kept
        assert begun(texts, "six").num_cached_tokens > 0


def test_the_least_recently_used_goes_first(memory: Memory) -> None:
    """The oldest text was evicted first, however often it was used."""
    texts = Texts(memory, max_bytes=10**9, max_texts=2)
    finished(texts, begun(texts, "one"))
    finished(texts, begun(texts, "two"))
    assert begun(texts, "once").num_cached_tokens == len("on")
    finished(texts, begun(texts, "six"))
    assert [begun(texts, text).num_cached_tokens > 0 for text in ("one", "two", "six")] == [True, False, True]


def test_a_text_that_goes_on_takes_the_place_of_its_beginning(memory: Memory) -> None:
    texts = Texts(memory, max_bytes=10**9)
    finished(texts, first := begun(texts, "one"))
    num_bytes = texts.kv_bytes
    finished(texts, begun(texts, [*first.session.tokens, 65]))
    assert texts.kv_bytes < 2 * num_bytes + 10**4


def test_limits_and_prompts_that_cannot_be_are_refused(memory: Memory) -> None:
    with pytest.raises(InvalidInput, match="max_bytes is 0"):
        Texts(memory, max_bytes=0)
    with pytest.raises(InvalidInput, match="empty"):
        Texts(memory, max_bytes=1).encode("")
