"""Deleted means gone: whatever is under way, whatever can be read, and whoever was killed while it was written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from inside import folder_of
from langchain_am_memory import AMMemoryCheckpointer, ChatAMMemory
from langgraph.checkpoint.memory import InMemorySaver
from typer.testing import CliRunner

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.main import app
from am_memory.conversations import threads as threads_module
from am_memory.conversations.prompts import Prompt
from am_memory.conversations.threads import Threads
from am_memory.conversations.turn import ChatTurn
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, SessionDeleted
from am_memory.session.saving import Packed, snapshot
from am_memory.storage import files
from am_memory.storage.store import Store

POLICY = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=16, originals="host")
SECRET = "the owl's secret"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def threads(engine: TransformersEngine, tmp_path: Path) -> Threads:
    return new_threads(engine, tmp_path)


def new_threads(engine: TransformersEngine, folder: Path) -> Threads:
    """As another process has them."""
    return Threads(Memory(engine, POLICY, store=folder / "store"))


def asked(text: str = SECRET) -> dict[str, object]:
    return {"role": "user", "content": text}


def answered(turn: ChatTurn) -> dict[str, object]:
    text = "".join(piece.text for piece in turn.session.generate(4, Sampling(temperature=0)))
    return {"role": "assistant", "content": text}


def told(threads: Threads, num_turns: int = 3, thread: str = "owls") -> list[dict[str, object]]:
    """A conversation that was compacted, and kept."""
    messages: list[dict[str, object]] = []
    for number in range(num_turns):
        messages.append(asked(f"{number} {SECRET} " * 2))
        turn = threads.turn(messages, thread=thread)
        messages.append(answered(turn))
        turn.keep(messages[-1])
    return messages


def begun(threads: Threads, messages: list[dict[str, object]]) -> ChatTurn:
    """A turn that has read nothing of its prompt yet."""
    prompt = Prompt.of(threads.memory.engine, messages, (), POLICY)
    turn = threads.start(prompt, threads.find(prompt, threads.register_call("owls")))
    turn.encode()
    return turn


def stored(folder: Path) -> list[Path]:
    """Every file below."""
    return [path for path in folder.rglob("*") if path.is_file()]


# While it is being answered


@pytest.mark.parametrize("moment", ["found", "reading", "answering", "answered"])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_conversation_deleted_while_it_is_answered_does_not_come_back(
    threads: Threads, tmp_path: Path, moment: str, is_new: bool
) -> None:
    messages = [] if is_new else told(threads)
    turn = begun(threads, [*messages, asked("and then? " * 8)])
    if moment == "found":
        assert threads.delete("owls")
    next(reading := turn.read())
    if moment == "reading":
        assert threads.delete("owls")
    assert [*reading][-1:] in ([], [0])
    pieces = turn.session.generate(4, Sampling(temperature=0))
    if moment in ("answering", "answered"):
        next(pieces)
    if moment == "answering":
        assert threads.delete("owls")
    text = "".join(piece.text for piece in pieces)
    if moment == "answered":
        assert threads.delete("owls")
    turn.keep({"role": "assistant", "content": text})
    assert threads.names() == threads.memory.names() == []
    assert stored(tmp_path / "store") == []
    assert not threads.delete("owls")


def test_a_conversation_deleted_while_it_is_found_does_not_come_back(
    threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, fork = told(threads), Session.fork

    def deleted_first(session: Session, **options: Any) -> Session:
        threads.delete("owls")
        return fork(session, **options)

    monkeypatch.setattr(Session, "fork", deleted_first)
    turn = threads.turn([*messages, asked()], thread="owls")
    turn.keep(answered(turn))
    assert threads.names() == []
    assert stored(tmp_path / "store") == []


def test_a_conversation_deleted_while_it_is_saved_does_not_come_back(
    threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, write = told(threads), threads_module.write

    def deleted_first(session: Session, what: Packed) -> None:
        threads.delete("owls")
        write(session, what)

    turn = threads.turn([*messages, asked()], thread="owls")
    answer = answered(turn)
    monkeypatch.setattr(threads_module, "write", deleted_first)
    turn.keep(answer)
    assert threads.names() == threads.memory.names() == []
    assert stored(tmp_path / "store") == []


def test_what_is_said_after_the_deletion_is_kept(threads: Threads) -> None:
    turn = begun(threads, [asked()])
    threads.delete("owls")
    later = threads.turn([asked("hello")], thread="owls")
    later.keep(answered(later))
    turn.keep({"role": "assistant", "content": ""})
    (branch,) = threads.branches("owls")
    assert branch.session.messages[0] == asked("hello")


def test_other_conversations_are_kept_whatever_they_went_on_from(threads: Threads) -> None:
    messages = told(threads)
    turn = threads.turn([*messages, asked()], thread="larks")
    threads.delete("owls")
    turn.keep(answered(turn))
    assert threads.names() == ["larks"]


@pytest.mark.parametrize("when", [1, 2])
def test_a_conversation_deleted_while_it_is_copied_leaves_no_copy(
    threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    messages = told(threads)
    turn = threads.turn([*messages[:2], asked("something else")], thread="owls")
    turn.keep(answered(turn))
    assert len(threads.branches("owls")) >= 2
    write, writes = threads_module.write, []

    def deleted_then(session: Session, what: Packed) -> None:
        writes.append(session.name)
        if len(writes) == when:
            threads.delete("owls")
        write(session, what)

    monkeypatch.setattr(threads_module, "write", deleted_then)
    with pytest.raises(InvalidInput, match="there is no thread 'owls'; there are: none"):
        threads.copy("owls", "copies")
    assert threads.names() == threads.memory.names() == []
    assert stored(tmp_path / "store") == []


def test_a_thread_that_is_pruned_to_nothing_is_deleted(threads: Threads, tmp_path: Path) -> None:
    turn = threads.turn([*told(threads), asked()], thread="owls")
    threads.prune("owls", keep=0)
    turn.keep(answered(turn))
    assert threads.names() == []
    assert stored(tmp_path / "store") == []


def test_a_session_that_was_deleted_is_not_saved_by_whoever_still_has_it(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    memory = Memory(engine, POLICY, store=tmp_path)
    session = memory.session("alice")
    session.append(SECRET)
    pieces = session.generate(4)
    next(pieces)
    memory.delete("alice")
    list(pieces)
    with pytest.raises(SessionDeleted, match=r"'alice' was deleted, .* Memory\.keep"):
        session.save()
    assert memory.names() == []
    assert stored(tmp_path) == []
    memory.keep(session, "bob")
    session.save()
    assert memory.store.names() == ["bob"]


# What cannot be read


def damaged(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> None:
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-9])


def of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> None:
    monkeypatch.setattr(engine, "info", replace(engine.info, fingerprint="another"))


def out_of_reach(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine) -> None:
    for path in folder.rglob("*.safetensors"):
        path.chmod(0)


@pytest.mark.parametrize("ruin", [damaged, of_another_model, out_of_reach])
@pytest.mark.parametrize("way", ["threads", "memory", "langchain", "command line"])
def test_what_cannot_be_read_is_listed_and_can_be_deleted(
    engine: TransformersEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ruin: Callable[[Path, pytest.MonkeyPatch, TransformersEngine], None],
    way: str,
) -> None:
    told(new_threads(engine, tmp_path))
    store = tmp_path / "store"
    ruin(store, monkeypatch, engine)
    threads = new_threads(engine, tmp_path)
    assert threads.names() == ["owls"]
    match way:
        case "threads":
            assert threads.delete("owls")
        case "memory":
            for name in threads.memory.names():
                threads.memory.delete(name)
        case "langchain":
            AMMemoryCheckpointer(InMemorySaver(), ChatAMMemory(model=threads.memory)).delete_thread("owls")
        case "command line":
            for name in Store(str(store)).names():
                assert CliRunner().invoke(app, ["delete", name, "--store", str(store)]).exit_code == 0
    assert threads.names() == []
    assert stored(store) == []


def test_deleting_what_is_not_there_says_what_is(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["delete", "alice", "--store", str(tmp_path)])
    assert result.exit_code == 1
    assert "SessionNotFound: no session 'alice'" in result.stderr


def test_a_name_that_was_cut_into_folders_leaves_none_of_them(engine: TransformersEngine, tmp_path: Path) -> None:
    store, long = Store(str(tmp_path)), "x" * 450
    session = Memory(engine, POLICY).session(long)
    for name in (long, long[:300]):
        store.save(name, snapshot(session))
    store.delete(long)
    assert store.names() == [long[:300]]
    store.delete(long[:300])
    assert [*tmp_path.iterdir()] == []


# What killed processes leave

KILLED = dedent("""
    import importlib.util, os, signal, sys, tempfile

    def module(name):
        spec = importlib.util.spec_from_file_location(name, f"am_memory/{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    files, spill = module("storage/files"), module("recall/original_files")
    path, tempfile.tempdir, when = sys.argv[1:]
    kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    spill.spill().write(b"the owl's secret" * 100)
    setattr(os, when, kill)
    from fsspec.implementations.local import LocalFileSystem
    files.write(LocalFileSystem(), path, b"the owl's secret" * 1000)
""")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("when", ["fsync", "link", "unlink"])
@pytest.mark.parametrize("then", ["saving", "deleting"])
def test_what_a_killed_process_was_writing_is_taken_away(
    engine: TransformersEngine, tmp_path: Path, when: str, then: str
) -> None:
    folder, temporary = tmp_path / "store", tmp_path / "temporary"
    temporary.mkdir()
    arguments = [str(folder / "alice.safetensors"), str(temporary), when]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert [*temporary.iterdir()] == []
    assert any(files.is_temporary(str(path)) for path in folder.iterdir())
    store = Store(str(folder))
    if then == "saving":
        store.save("bob", snapshot(Memory(engine, POLICY).session("bob")))
        store.delete("bob")
    store.delete("alice")
    assert stored(folder) == []


def test_what_somebody_else_is_writing_stays(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = snapshot(Memory(engine, POLICY).session("alice"))
    fsync = os.fsync

    def others_save_and_delete(number: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        fsync(number)
        Store(str(tmp_path)).save("bob", saved)
        Store(str(tmp_path)).delete("bob")

    monkeypatch.setattr(os, "fsync", others_save_and_delete)
    store = Store(str(tmp_path))
    store.save("alice", saved)
    assert store.names() == ["alice"]
    assert len(stored(tmp_path)) == 1


def test_a_file_that_was_taken_away_before_it_was_locked_is_written_again(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = files._lock, []

    def taken_away_first(file: Any, **options: Any) -> bool:
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)
        return lock(file, **options)

    monkeypatch.setattr(files, "_lock", taken_away_first)
    store = Store(str(tmp_path))
    store.save("alice", snapshot(Memory(engine, POLICY).session("alice")))
    assert files.is_temporary(taken[0])
    assert store.names() == ["alice"]


@pytest.mark.parametrize(("hours", "is_left"), [(1, True), (25, False)])
def test_where_there_are_no_locks_what_is_a_day_old_is_nobodys(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, hours: int, is_left: bool
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    store = Store("memory://store")
    with monkeypatch.context() as patch:
        now = files.time.time()
        patch.setattr(files.time, "time", lambda: now - hours * 3600)
        patch.setattr(MemoryFileSystem, "mv", killed)
        patch.setattr(MemoryFileSystem, "rm_file", killed)
        with pytest.raises(KeyboardInterrupt):
            store.save("alice", snapshot(Memory(engine, POLICY).session("alice")))
    assert len(folder_of(store).files.ls("/store")) == 1
    Store("memory://store").delete("alice")
    assert len(folder_of(store).files.ls("/store")) == is_left


def killed(*args: object, **options: object) -> None:
    raise KeyboardInterrupt
