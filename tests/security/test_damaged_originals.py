"""Originals that are not what they were: they are missed and told of, and the session lives on without them."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem
from inside import context_of, originals_of

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, OriginalLost
from am_memory.events import Event, OriginalsLost
from am_memory.recall.original_files import FilePart, Spill
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import DiskEntries, HostEntries, Original, packed
from am_memory.session.saving import snapshot
from am_memory.storage.store import Store

POLICY = MemoryPolicy(trigger_tokens=128, keep_ratio=0.25, keep_recent=8, pinned=3, chunk_tokens=32, originals="disk")

NewMemory = Callable[..., Memory]


@pytest.fixture(autouse=True)
def empty_spill() -> None:
    """Sessions of earlier tests that wait for the collector would leave gaps in the file that all originals share."""
    gc.collect()


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path, events: list[Event]) -> NewMemory:
    """Makes memories that share the model, a store, and who listens."""

    def make(originals: str = "disk") -> Memory:
        policy = POLICY.with_changes(originals=originals)
        store = tmp_path / "store"
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=store, on_event=events.append)

    return make


def read_session(memory: Memory) -> Session:
    session = memory.session("alice")
    session.append(random.Random(0).choices(range(256), k=300))
    assert len(session.segments) > 1
    return session


def spans(session: Session) -> list[tuple[int, int]]:
    return [(original.start, original.end) for original in originals_of(session)]


def lost(events: list[Event]) -> list[tuple[int, int]]:
    return [(event.start, event.end) for event in events if isinstance(event, OriginalsLost)]


def part_of(original: Original) -> FilePart:
    assert isinstance(original._held, DiskEntries)
    return original._held.part


def flip(original: Original, place: int = -1) -> None:
    """Change one bit of it on the disk."""
    part = part_of(original)
    data = bytearray(part.read())
    data[place] ^= 4
    os.pwrite(part.file._file.fileno(), data, part.offset)


def cut(original: Original) -> None:
    """End the file before it ends."""
    part = part_of(original)
    part.file._file.truncate(part.offset + part.nbytes // 2)


def went_on(session: Session) -> list[int]:
    return [token for piece in session.generate(8) for token in piece.token_ids]


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_recall_of_what_was_damaged_is_refused_and_told_once(
    new_memory: NewMemory, events: list[Event], damage: Callable[[Original], None]
) -> None:
    session = read_session(new_memory())
    before, kept = session.stats, spans(session)
    damage(originals_of(session)[-1])
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"cannot be recalled: .* or are lost"):
            session.recall(kept[-1])
    assert lost(events) == kept[-1:]
    assert spans(session) == kept[:-1]
    after = session.stats
    assert after.originals_bytes < before.originals_bytes
    assert (after.kv_tokens, after.num_segments) == (before.kv_tokens, before.num_segments)
    if damage is flip:
        assert session.recall(kept[0])


def test_a_search_does_without_what_was_damaged(new_memory: NewMemory, events: list[Event]) -> None:
    session = read_session(new_memory())
    other = read_session(Memory(session.engine, POLICY.with_changes(originals="host")))
    kept = spans(session)
    flip(originals_of(session)[0], 400)
    context_of(other).originals = originals_of(other)[1:]
    assert session.search("hoo") == other.search("hoo")
    assert lost(events) == kept[:1]


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_session_is_saved_without_what_was_damaged_and_loads(
    new_memory: NewMemory, events: list[Event], damage: Callable[[Original], None], tmp_path: Path
) -> None:
    """One bit was saved under the sound digest, and nothing of the session could be read again."""
    session = read_session(new_memory())
    kept = spans(session)
    damage(originals_of(session)[-1])
    session.save()
    assert lost(events) == kept[-1:]
    for path in (tmp_path / "store" / "originals").iterdir():
        data = path.read_bytes()
        assert not data or sha256(data).hexdigest() == path.name.removesuffix(".safetensors")
    events.clear()
    resumed = new_memory().session("alice")
    assert spans(resumed) == kept[:-1]
    assert lost(events) == []
    assert resumed.recall(kept[0])
    with pytest.raises(InvalidInput, match="or are lost"):
        resumed.recall(kept[-1])
    assert went_on(resumed.fork()) is not None


def test_a_disk_that_cannot_be_read_fails_no_save(
    new_memory: NewMemory, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = read_session(new_memory())
    kept = spans(session)

    def unreadable(*args: object) -> bytes:
        raise OSError("input/output error")

    monkeypatch.setattr(Spill, "read", unreadable)
    session.save()
    assert lost(events) == kept
    assert all("input/output error" in event.reason for event in events if isinstance(event, OriginalsLost))
    assert new_memory().session("alice").tokens == session.tokens


def test_each_branch_that_had_them_tells_of_it(new_memory: NewMemory, events: list[Event]) -> None:
    session = read_session(new_memory())
    branch, kept = session.fork("bob"), spans(session)
    flip(originals_of(session)[0])
    for each in (session, branch):
        each.save()
    told = [(event.session, event.start) for event in events if isinstance(event, OriginalsLost)]
    assert told == [("alice", kept[0][0]), ("bob", kept[0][0])]


# In the store


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("damage", [altered, cut_off, gone])
def test_what_was_damaged_in_the_store_is_missed_and_told(
    new_memory: NewMemory,
    events: list[Event],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: str,
    damage: Callable[[Path], None],
) -> None:
    session = read_session(new_memory(place))
    session.save()
    kept, first = spans(session), originals_of(session)[0]
    damage(tmp_path / "store" / "originals" / f"{first.digest}.safetensors")
    with caplog.at_level(logging.WARNING, "am_memory"):
        resumed = new_memory(place).session("alice")
        assert resumed.search("hoo")
        with pytest.raises(InvalidInput, match="or are lost"):
            resumed.recall((first.start, first.end))
    assert lost(events) == kept[:1]
    assert f"tokens {first.start} to {first.end} are lost" in caplog.text
    assert spans(resumed) == kept[1:]
    assert went_on(resumed) == went_on(session.fork())
    resumed.save()
    again = new_memory(place).session("alice")
    assert lost(events) == kept[:1]
    assert again.recall(kept[1])


@pytest.mark.parametrize("change", [
    lambda entries: entries[:-1],
    lambda entries: [(key[:1], value) for key, value in entries],
    lambda entries: [(key[:, :-1], value[:, :-1]) for key, value in entries],
    lambda entries: [(key[..., :-1], value) for key, value in entries],
    lambda entries: [(key.half(), value.half()) for key, value in entries],
    lambda entries: [(key[0], value[0]) for key, value in entries],
    lambda entries: [],
])  # fmt: skip
def test_sound_bytes_of_something_else_are_no_originals(
    new_memory: NewMemory,
    events: list[Event],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[list[tuple[torch.Tensor, torch.Tensor]]], list[tuple[torch.Tensor, torch.Tensor]]],
) -> None:
    """Under a digest of their own, which the session's file names: whoever can write one can write the other."""
    session = read_session(new_memory("host"))
    first, *others = originals_of(session)
    tensors = {}
    for index, (key, value) in enumerate(change(first.layers())):
        tensors[f"{index}.key"], tensors[f"{index}.value"] = key.contiguous(), value.contiguous()
    data = safetensors.torch.save(tensors)
    vars(first._held)["digest"] = sha256(data).hexdigest()
    monkeypatch.setattr(HostEntries, "packed", lambda held: data if held is first._held else packed(held.entries))
    session.save()
    resumed = new_memory("host").session("alice")
    assert resumed.search("hoo")
    with pytest.raises(InvalidInput, match="or are lost"):
        resumed.recall((first.start, first.end))
    assert lost(events) == [(first.start, first.end)]
    assert [original.digest for original in originals_of(resumed)] == [original.digest for original in others]


@pytest.mark.parametrize("damage", [altered, gone])
def test_what_was_damaged_in_a_store_far_away_is_told_when_the_session_is_loaded(
    engine: TransformersEngine, events: list[Event], damage: Callable[[Path], None], tmp_path: Path
) -> None:
    """There originals are copied at once: nobody waits for a network who uses a session."""
    memories = [Memory(engine, POLICY, store=f"memory://{tmp_path}", on_event=events.append) for _ in range(2)]
    session = read_session(memories[0])
    session.save()
    kept, first = spans(session), originals_of(session)[0]
    files, path = MemoryFileSystem(), f"{tmp_path}/originals/{first.digest}.safetensors"
    if damage is gone:
        files.rm_file(path)
    else:
        files.pipe_file(path, files.cat_file(path)[:-1] + b"x")
    resumed = memories[1].session("alice")
    assert lost(events) == kept[:1]
    assert {original.place for original in originals_of(resumed)} == {"disk"}
    assert resumed.recall(kept[1])


def test_what_was_damaged_on_the_disk_is_read_from_the_store(new_memory: NewMemory, events: list[Event]) -> None:
    session = read_session(new_memory())
    session.save()
    first = originals_of(session)[0]
    flip(first)
    assert session.recall((first.start, first.end))
    assert first.place == "store"
    assert lost(events) == []


def test_the_store_itself_refuses_to_write_what_was_damaged(new_memory: NewMemory, tmp_path: Path) -> None:
    session = read_session(new_memory())
    flip(originals_of(session)[0])
    saved = snapshot(session)
    with pytest.raises(OriginalLost, match=r"were altered on the disk, in .*; what is compact stays as it is"):
        Store(str(tmp_path / "other")).save("alice", saved)
    assert Store(str(tmp_path / "other")).names() == []


def test_the_same_bytes_of_other_tokens_are_another_original(new_memory: NewMemory, tmp_path: Path) -> None:
    """What was loaded is known by its digest: it stood for the tokens of the session that was loaded first."""
    session = read_session(new_memory("host"))
    session.save()
    store, originals = Store(str(tmp_path / "store")), OriginalStore()
    loaded = store.load("alice")
    moved = tuple(each.model_copy(update={"start": each.start + 1, "end": each.end + 1}) for each in loaded.left_out)
    kept = [
        store.with_originals(each, originals, "host").originals
        for each in (loaded, loaded.__class__(**{**vars(loaded), "left_out": moved}))
    ]
    assert [original.start + 1 for original in kept[0]] == [original.start for original in kept[1]]
