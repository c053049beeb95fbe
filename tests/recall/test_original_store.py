"""Originals of all sessions within two bounds: what moves to disk, what is dropped, and what sessions see of it."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from inside import originals_of, shared_of

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, OriginalLost
from am_memory.events import Event, OriginalsDropped, OriginalsLost
from am_memory.recall import original_store
from am_memory.recall.original_files import Spill, spill
from am_memory.recall.original_store import ORIGINAL_TOKENS, OriginalStore, machine_bytes
from am_memory.recall.originals import KeysAndValues, Original, packed
from am_memory.recall.search_index import index_bytes

TOKENS = 10
ENOUGH = 10**9


def entries(num_tokens: int = TOKENS, seed: int = 0) -> list[KeysAndValues]:
    """Keys and values of two layers."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, num_tokens, 8, generator=generator), torch.randn(2, num_tokens, 8, generator=generator))
        for _ in range(2)
    ]


SIZE = sum(key.nbytes + value.nbytes for key, value in entries())
DISK_SIZE = len(packed(entries()))


def kept(store: OriginalStore, count: int, place: str = "host") -> list[Original]:
    """As many originals of `TOKENS` tokens, each with entries of its own."""
    return [
        original
        for index in range(count)
        for original in store.keep(index * TOKENS, (index + 1) * TOKENS, entries(seed=index), place)
    ]


def places(originals: list[Original]) -> list[str | None]:
    return [original.place for original in originals]


def assert_whole(original: Original) -> None:
    expected = entries(seed=original.start // TOKENS)
    for mine, theirs in zip(original.layers(), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary files of its own: a new file for what is moved to disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


# Pieces


def test_a_long_span_is_kept_in_pieces_of_like_size() -> None:
    store, num_tokens = OriginalStore(), 2 * ORIGINAL_TOKENS + 1
    whole = entries(num_tokens)
    originals = store.keep(5, 5 + num_tokens, whole, "host")
    assert [original.start for original in originals[1:]] == [original.end for original in originals[:-1]]
    assert {original.end - original.start for original in originals} == {num_tokens // 3}
    assert torch.equal(torch.cat([original.layers()[1][0] for original in originals], dim=1), whole[1][0])
    assert store.bytes_in("host") == sum(key.nbytes + value.nbytes for key, value in whole)


def test_a_piece_holds_no_memory_of_the_others() -> None:
    whole = entries(2 * ORIGINAL_TOKENS)
    for original in OriginalStore().keep(0, 2 * ORIGINAL_TOKENS, whole, "host"):
        for key, value in original.layers():
            assert key.untyped_storage().nbytes() == key.nbytes
            assert value.untyped_storage().nbytes() == value.nbytes


# Bounds


def test_what_is_made_first_moves_to_disk_first() -> None:
    store = OriginalStore(3 * SIZE, ENOUGH)
    originals = kept(store, 5)
    assert places(originals) == ["disk", "disk", "host", "host", "host"]
    assert (store.bytes_in("host"), store.bytes_in("disk")) == (3 * SIZE, 2 * DISK_SIZE)
    for original in originals:
        assert_whole(original)


def test_what_was_read_last_moves_last() -> None:
    store = OriginalStore(3 * SIZE, ENOUGH)
    originals = kept(store, 3)
    originals[0].layers(2, 3)
    kept(store, 2)
    assert places(originals) == ["host", "disk", "disk"]


def test_to_save_or_look_at_an_original_is_no_use() -> None:
    store = OriginalStore(2 * SIZE, ENOUGH)
    originals = kept(store, 2)
    assert originals[0].packed() and originals[0].digest and repr(originals[0]) and originals[0].nbytes
    originals += kept(store, 1)
    assert places(originals) == ["disk", "host", "host"]


def test_when_the_disk_is_full_the_least_used_there_are_dropped() -> None:
    store = OriginalStore(2 * SIZE, 2 * DISK_SIZE)
    originals = kept(store, 4)
    assert_whole(originals[0])
    originals += kept(store, 2)
    assert places(originals) == ["disk", None, None, "disk", "host", "host"]
    for original in originals:
        assert original.is_dropped == (original.place is None)
        assert store.bytes_in("host") <= store.host_bytes and store.bytes_in("disk") <= store.disk_bytes
        if original.is_dropped:
            assert original.nbytes == 0
            with pytest.raises(OriginalLost, match=r"tokens \d+ to \d+ cannot be read: there is no room .* raise one"):
                original.layers()
        else:
            assert_whole(original)


@pytest.mark.parametrize(("host_bytes", "disk_bytes", "place", "expected"), [
    (0, ENOUGH, "host", ["disk", "disk"]),
    (SIZE - 1, ENOUGH, "host", ["disk", "disk"]),
    (0, DISK_SIZE, "host", [None, "disk"]),
    (SIZE, 0, "host", [None, "host"]),
    (0, 0, "host", [None, None]),
    (ENOUGH, DISK_SIZE, "disk", [None, "disk"]),
    (ENOUGH, 0, "disk", [None, None]),
])  # fmt: skip
def test_small_bounds_hold(host_bytes: int, disk_bytes: int, place: str, expected: list[str | None]) -> None:
    originals = kept(OriginalStore(host_bytes, disk_bytes), 2, place)
    assert places(originals) == expected
    assert [original.is_dropped for original in originals] == [place is None for place in expected]


def test_what_can_never_fit_drives_nothing_out() -> None:
    store = OriginalStore(2 * SIZE, 2 * DISK_SIZE)
    originals = kept(store, 4)
    before = places(originals)
    (large,) = store.keep(100, 100 + 5 * TOKENS, entries(5 * TOKENS), "host")
    assert large.is_dropped
    assert places(originals) == before


def test_originals_that_nobody_has_any_more_leave_their_room() -> None:
    store = OriginalStore(2 * SIZE, 2 * DISK_SIZE)
    originals = kept(store, 4)
    del originals[:]
    gc.collect()
    assert store.bytes_in("host") == store.bytes_in("disk") == spill().size == 0
    assert places(kept(store, 2)) == ["host", "host"]


def test_a_disk_that_cannot_be_written_loses_what_moves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    store = OriginalStore(SIZE, ENOUGH)

    def full(*args: object) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(Spill, "write", full)
    first, second = kept(store, 2)
    assert first.lost is not None and "no space left; set TMPDIR to a folder with room" in first.lost
    assert not first.is_dropped
    assert_whole(second)


def test_a_reader_ends_what_it_began_while_its_original_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room in the file was used again under the reader, which then took its entries for damaged."""
    store = OriginalStore(0, DISK_SIZE)
    (original,) = kept(store, 1)
    read = Spill.read

    def read_late(file: Spill, start: int, size: int) -> bytes:
        monkeypatch.setattr(Spill, "read", read)
        kept(store, 1)
        assert original.is_dropped
        return read(file, start, size)

    monkeypatch.setattr(Spill, "read", read_late)
    assert_whole(original)
    assert original.is_dropped


def test_moving_keeps_the_digest() -> None:
    store = OriginalStore(SIZE, 2 * DISK_SIZE)
    (original,) = kept(store, 1)
    digest = original.digest
    kept(store, 1)
    assert (original.place, original.digest) == ("disk", digest)
    kept(store, 3)
    assert (original.place, original.digest) == (None, digest)


def test_threads_may_make_read_and_lose_them() -> None:
    store = OriginalStore(5 * SIZE, 5 * DISK_SIZE)

    def work(seed: int) -> int:
        chance, mine, num_lost = random.Random(seed), [], 0
        for _ in range(60):
            mine += kept(store, 1 + chance.randrange(3))
            original = chance.choice(mine)
            with suppress(OriginalLost):
                assert_whole(original)
            assert original.lost is None or original.is_dropped
            num_lost += original.is_dropped
            mine = mine[-8:]
        return num_lost

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(work, range(6))) > 0
    assert store.bytes_in("host") <= store.host_bytes
    assert store.bytes_in("disk") <= store.disk_bytes
    gc.collect()
    assert spill().size == store.bytes_in("disk") == 0


def test_what_another_store_made_is_held_within_the_bounds() -> None:
    store = OriginalStore(2 * SIZE, DISK_SIZE)
    made = kept(store.without_drops(), 5)
    assert places(made) == ["disk", "disk", "disk", "host", "host"]
    mine = kept(store, 1)
    store.adopt(made)
    assert places([*made, *mine]) == [None, None, None, "disk", "host", "host"]
    store.adopt(made)
    assert store.bytes_in("host") == 2 * SIZE


def test_search_keys_take_of_the_room_in_host_memory(new_memory: NewMemory) -> None:
    """They grow with the conversation, and counted in no bound."""
    memory = new_memory(100_000, ENOUGH)
    session = read_session(memory)
    store, before = shared_of(memory).original_store, places(list(originals_of(session))).count("host")
    session.search("what?")
    store.adopt(())
    keys = index_bytes(originals_of(session))
    assert 0 < keys <= store.bytes_in("host") <= 100_000
    assert places(list(originals_of(session))).count("host") < before


@pytest.mark.parametrize("bound", [-1, 0.5, "8", True])
def test_a_bound_is_a_whole_number_of_bytes(bound: object) -> None:
    with pytest.raises(InvalidInput, match="originals_bytes is .*: give a whole number, at least 0"):
        OriginalStore(bound)
    with pytest.raises(InvalidInput, match="originals_disk_bytes is .*: give a whole number, at least 0"):
        OriginalStore(0, bound)


def test_the_defaults_are_shares_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(original_store, "MEMORY_LIMITS", [])
    assert OriginalStore().host_bytes == machine_bytes() // 8 > 0
    assert OriginalStore().disk_bytes > 0


def test_the_limit_of_a_container_counts_as_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("limit", "none", "missing")]
    monkeypatch.setattr(original_store, "MEMORY_LIMITS", [str(path) for path in paths])
    paths[0].write_text("1048576\n")
    paths[1].write_text("max\n")
    assert OriginalStore().host_bytes == 2**17


def test_where_nothing_can_be_written_there_is_no_room_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    assert OriginalStore().disk_bytes == 0


# Sessions

POLICY = MemoryPolicy(trigger_tokens=128, keep_ratio=0.25, keep_recent=8, pinned=3, chunk_tokens=32, originals="host")
NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path, events: list[Event]) -> NewMemory:
    """Makes memories with other bounds that share the model, a store, and who listens."""

    def make(host_bytes: int, disk_bytes: int, **changes: object) -> Memory:
        return Memory(
            engine,
            POLICY.model_copy(update=changes),
            sampling=Sampling(temperature=0),
            store=tmp_path / "store",
            on_event=events.append,
            originals_bytes=host_bytes,
            originals_disk_bytes=disk_bytes,
        )

    return make


def read_session(memory: Memory, name: str = "alice", num_tokens: int = 300) -> Session:
    session = memory.session(name)
    session.append(random.Random(name).choices(range(256), k=num_tokens))
    return session


def bytes_of(memory: Memory) -> tuple[int, int]:
    store = shared_of(memory).original_store
    return store.bytes_in("host"), store.bytes_in("disk")


def test_the_bound_is_one_for_all_sessions_of_a_memory(new_memory: NewMemory) -> None:
    memory = new_memory(100_000, ENOUGH)
    sessions = [read_session(memory, name) for name in ("alice", "bob", "carol")]
    in_host, on_disk = bytes_of(memory)
    assert 50_000 < in_host <= 100_000
    assert sum(session.stats.originals_bytes for session in sessions) == in_host + on_disk
    assert {original.place for original in originals_of(sessions[0])} == {"disk"}
    assert originals_of(sessions[2])[-1].place == "host"
    for session in sessions:
        (segment,) = session.recall(session.segments[0])
        assert session.recalled == (segment,)


def test_a_session_goes_on_without_what_was_dropped(new_memory: NewMemory, events: list[Event]) -> None:
    roomy, narrow = new_memory(ENOUGH, 0), new_memory(80_000, 0)
    session, other = (read_session(memory) for memory in (narrow, roomy))
    assert session.stats.originals_bytes <= 80_000 < other.stats.originals_bytes
    assert session.segments == other.segments
    dropped = [(original.start, original.end) for original in originals_of(session) if original.is_dropped]
    assert session.search("what?")
    told = [event for event in events if isinstance(event, OriginalsDropped)]
    assert [(event.start, event.end) for event in told] == dropped != []
    assert all(event.session == "alice" and "originals_bytes (0.1 MiB)" in event.reason for event in told)
    assert not [event for event in events if isinstance(event, OriginalsLost)]
    assert session.recall(session.segments[-1])
    with pytest.raises(InvalidInput, match="or are lost; .* originals_bytes and originals_disk_bytes"):
        session.recall(dropped[0])
    for each in (session, other):
        each.append([1, 2, 3])
        each.compact()
    assert session.segments == other.segments


def test_forks_share_what_they_have_and_what_they_lose(new_memory: NewMemory, events: list[Event]) -> None:
    memory = new_memory(100_000, 0)
    session = read_session(memory, num_tokens=150)
    branch = session.fork("bob")
    assert originals_of(branch) == originals_of(session)
    assert bytes_of(memory)[0] == session.stats.originals_bytes
    read_session(memory, "carol", num_tokens=600)
    for each in (session, branch):
        assert each.stats.originals_bytes == 0
        each.search("what?")
    told = [event.session for event in events if isinstance(event, OriginalsDropped)]
    assert set(told) >= {"alice", "bob"}


@pytest.mark.parametrize("originals", ["host", "disk", "drop"])
def test_a_session_is_rebuilt_with_its_recalls_in_no_room_at_all(new_memory: NewMemory, originals: str) -> None:
    """The recall could not be repeated, and the session could not be rewound any more."""
    session = read_session(new_memory(ENOUGH, ENOUGH))
    session.recall(session.segments[0])
    session.append(list(range(40)))
    before = session.fork("bob")
    num_tokens, segments = len(session.tokens), session.segments
    session.append(list(range(100)))
    session.save()
    memory = new_memory(0, 0, originals=originals)
    resumed = memory.session("alice")
    resumed.rewind(num_tokens)
    assert resumed.segments == segments
    assert bytes_of(memory) == (0, 0)
    torch.testing.assert_close(resumed.logits([1, 2, 3]), before.logits([1, 2, 3]), rtol=0, atol=1e-3)


def test_a_compaction_in_the_background_keeps_to_the_bounds(new_memory: NewMemory) -> None:
    memory = new_memory(30_000, 30_000, ahead_tokens=12)
    sessions = [read_session(memory, name) for name in ("alice", "bob")]
    assert all(size <= 30_000 for size in bytes_of(memory))
    assert sessions[1].recall(sessions[1].segments[-1])


def test_what_is_saved_needs_no_room(new_memory: NewMemory, events: list[Event]) -> None:
    """Saved again after its originals had been dropped, a session lost them in the store as well."""
    session = read_session(new_memory(ENOUGH, 0))
    session.save()
    spans = [(original.start, original.end) for original in originals_of(session)]
    memory = new_memory(0, 0)
    for _ in range(2):
        resumed = memory.session("alice")
        assert [(original.start, original.end) for original in originals_of(resumed)] == spans
        assert places(originals_of(resumed)) == ["store"] * len(spans)
        assert resumed.search("what?") == session.search("what?")
        resumed.save()
        memory.release("alice")
    assert bytes_of(memory) == (0, 0)
    assert not [event for event in events if isinstance(event, OriginalsDropped | OriginalsLost)]
    assert resumed.recall(resumed.segments[0])


def test_what_is_saved_leaves_the_host_without_a_copy_on_disk(new_memory: NewMemory) -> None:
    memory = new_memory(100_000, ENOUGH)
    session = read_session(memory, num_tokens=150)
    session.save()
    read_session(memory, "bob", num_tokens=600)
    assert set(places(originals_of(session))) == {"store"}
    assert session.stats.originals_bytes == 0
    assert session.recall(session.segments[0])


def test_who_needs_what_was_saved_and_deleted_keeps_it(new_memory: NewMemory) -> None:
    memory = new_memory(100_000, ENOUGH)
    session = read_session(memory, num_tokens=150)
    session.save()
    branch = session.fork()
    memory.delete("alice")
    read_session(memory, "bob", num_tokens=600)
    assert set(places(originals_of(branch))) == {"disk"}
    assert branch.recall(branch.segments[0])


def test_a_store_far_away_is_read_within_the_bounds(engine: TransformersEngine, tmp_path: Path) -> None:
    memories = [
        Memory(engine, POLICY, store=f"memory://{tmp_path}", originals_bytes=size, originals_disk_bytes=size)
        for size in (ENOUGH, 40_000)
    ]
    session = read_session(memories[0])
    session.save()
    resumed = memories[1].session("alice")
    assert all(0 < size <= 40_000 for size in bytes_of(memories[1]))
    assert resumed.segments == session.segments
    assert resumed.recall(resumed.segments[-1])
