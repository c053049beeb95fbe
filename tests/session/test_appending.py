"""An append in its three steps, as a scheduler takes them: encode, add, read."""

from __future__ import annotations

import pytest
from policies import plain_policy

from am_memory import Memory, UnsupportedOperation
from am_memory.engines.transformers import TransformersEngine
from am_memory.session.appending import add, encode, read

POLICY = plain_policy(trigger_tokens=96, keep_ratio=0.25, keep_recent=4, pinned=3, chunk_tokens=16)
TEXT = "An owl sleeps in the barn, and a swallow under its roof."


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


def test_the_steps_are_the_call(memory: Memory) -> None:
    whole, stepped = memory.session("whole"), memory.session("stepped")
    num_tokens = whole.append(TEXT)
    assert add(stepped, encode(stepped, TEXT)) == num_tokens
    while read(stepped):
        pass
    assert stepped.tokens == whole.tokens
    assert stepped.stats == whole.stats


def test_nothing_changes_before_the_content_is_added(memory: Memory) -> None:
    session = memory.session()
    encoded = encode(session, TEXT)
    assert session.tokens == ()
    add(session, encoded)
    assert session.tokens == tuple(encoded.token_ids)
    assert session.stats.kv_tokens == 0


def test_a_chunk_is_read_at_a_time_and_the_last_token_is_left(memory: Memory) -> None:
    session = memory.session()
    add(session, encode(session, list(range(40))))
    assert [read(session), read(session), read(session), read(session)] == [23, 7, 0, 0]
    assert session.stats.kv_tokens == 39


def test_content_is_added_only_where_it_was_encoded_for(memory: Memory) -> None:
    session = memory.session()
    encoded = encode(session, TEXT)
    session.append("Something else.")
    with pytest.raises(UnsupportedOperation, match="changed since this was encoded: encode it again"):
        add(session, encoded)
