"""A session is packed while the engine is held, and written or read while others use the engine."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from inside import shared_of
from policies import plain_policy

from am_memory import Memory
from am_memory.engines.transformers import TransformersEngine
from am_memory.session.saving import pack, snapshot, write
from am_memory.storage.store import Store

POLICY = plain_policy(trigger_tokens=96, keep_ratio=0.25, keep_recent=4, pinned=3)


@pytest.fixture
def memory(engine: TransformersEngine, tmp_path: Path) -> Memory:
    return Memory(engine, POLICY, store=tmp_path)


def engine_is_free(memory: Memory) -> bool:
    """Whether another thread gets the engine at once."""
    lock, got = shared_of(memory).engine_lock, list[bool]()

    def take() -> None:
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got == [True]


def test_a_session_is_written_as_it_was_packed(memory: Memory) -> None:
    session = memory.session("alice")
    session.append("An owl.")
    packed, tokens = pack(session), session.tokens
    session.append("And a swallow.")
    write(session, packed)
    memory.release("alice")
    assert memory.session("alice").tokens == tokens


def test_a_snapshot_is_what_is_loaded(memory: Memory) -> None:
    session = memory.session("alice")
    session.append("An owl.")
    session.save()
    saved = memory.load("alice")
    assert (saved.tokens, saved.policy) == (snapshot(session).tokens, snapshot(session).policy)
    memory.release("alice")
    assert memory.session("alice", saved=saved).tokens == session.tokens


def test_a_snapshot_is_taken_between_two_steps(memory: Memory) -> None:
    """The server's view of a conversation was taken while the idle worker swapped in a segment."""
    session, lock = memory.session("alice"), shared_of(memory).engine_lock
    session.append("An owl.")
    taken = threading.Event()

    def take() -> None:
        snapshot(session)
        taken.set()

    thread = threading.Thread(target=take)
    with lock:
        thread.start()
        assert not taken.wait(0.1)
    thread.join()
    assert taken.is_set()


@pytest.mark.parametrize("call", ["load", "save"])
def test_nobody_waits_for_the_store_with_the_engine_in_hand(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A session was read from the store under the engine's lock, and a slow store held up all other sessions."""
    session = memory.session("alice")
    session.append("An owl.")
    session.save()
    free, used = list[bool](), getattr(Store, call)

    def noted(store: Store, *args: object, **options: object) -> object:
        free.append(engine_is_free(memory))
        return used(store, *args, **options)

    monkeypatch.setattr(Store, call, noted)
    session.append("And a swallow.")
    session.save()
    memory.release("alice")
    assert memory.session("alice").tokens == session.tokens
    assert free == [True]
