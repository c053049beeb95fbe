"""Two processes on one store: whoever saves second is told, and nothing that was said is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from inside import folder_of, shared_of
from typer.testing import CliRunner

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.main import app
from am_memory.conversations.threads import Threads
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import SessionChanged, SessionDeleted
from am_memory.session.saving import rename
from am_memory.storage import files
from am_memory.storage.store import Store
from am_memory.storage.tensor_file import version_of

POLICY = MemoryPolicy(trigger_tokens=500, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=64)
ROOT = Path(__file__).parent.parent.parent

NewMemory = Callable[[], Memory]


@pytest.fixture(params=["", "memory://"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return f"{request.param}{tmp_path}/store"


@pytest.fixture
def new_memory(engine: TransformersEngine, url: str) -> NewMemory:
    """As another process has it: nothing is shared but the model and the store."""
    return lambda: Memory(engine, POLICY, sampling=Sampling(temperature=0), store=url)


def saved_session(memory: Memory, text: str = "An owl sat on an oak. ") -> Session:
    session = memory.session("alice")
    session.append(text)
    session.save()
    return session


def test_the_second_to_save_is_told_and_can_keep_both(new_memory: NewMemory) -> None:
    saved_session(new_memory())
    memory = new_memory()
    mine, theirs = memory.session("alice"), new_memory().session("alice")
    theirs.append("They say so.")
    theirs.save()
    mine.append("I say this.")
    before = mine.tokens
    for _ in range(2):
        with pytest.raises(
            SessionChanged, match=r"another program saved it meanwhile\. Nothing is lost: .* NAME.* overwrite"
        ):
            mine.save()
    assert mine.tokens == before
    assert new_memory().session("alice").tokens == theirs.tokens
    memory.keep(mine, "alice-2")
    mine.save()
    assert new_memory().session("alice-2").tokens == before
    assert new_memory().session("alice").tokens == theirs.tokens


def test_it_can_be_overwritten_if_that_is_said(new_memory: NewMemory) -> None:
    saved_session(new_memory())
    mine, theirs = new_memory().session("alice"), new_memory().session("alice")
    theirs.append("They say so.")
    theirs.save()
    mine.append("I say this.")
    mine.save(overwrite=True)
    mine.append("And that.")
    mine.save()
    assert new_memory().session("alice").tokens == mine.tokens


def test_two_who_begin_a_session_of_one_name_do_not_overwrite_each_other(new_memory: NewMemory) -> None:
    mine, theirs = new_memory().session("alice"), new_memory().session("alice")
    theirs.append("They say so.")
    theirs.save()
    mine.append("I say this.")
    with pytest.raises(SessionChanged, match="another one was saved meanwhile"):
        mine.save()


def test_a_fork_or_a_new_name_overwrites_nothing(new_memory: NewMemory) -> None:
    session = saved_session(new_memory())
    fork = session.fork("bob")
    other = new_memory().session("bob")
    other.append("Bob.")
    other.save()
    with pytest.raises(SessionChanged):
        fork.save()
    rename(session, "bob")
    with pytest.raises(SessionChanged):
        session.save()


def test_what_is_kept_takes_the_place_of_what_this_process_knows(new_memory: NewMemory) -> None:
    saved_session(new_memory())
    memory = new_memory()
    fork = memory.session("alice").fork()
    memory.keep(fork, "alice")
    fork.append("And so on.")
    fork.save()
    assert new_memory().session("alice").tokens == fork.tokens


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("is_the_same", [False, True])
def test_what_is_kept_overwrites_nothing_that_another_process_saved(
    new_memory: NewMemory, is_held: bool, is_the_same: bool
) -> None:
    saved_session(new_memory())
    memory = new_memory()
    session = memory.session("alice")
    mine = session if is_the_same else session.fork()
    if not is_held:
        memory.release("alice")
    theirs = new_memory().session("alice")
    theirs.append("They say so.")
    theirs.save()
    memory.keep(mine, "alice")
    with pytest.raises(SessionChanged):
        mine.save()
    assert new_memory().session("alice").tokens == theirs.tokens
    memory.keep(mine, "alice", overwrite=True)
    mine.save()
    assert new_memory().session("alice").tokens == mine.tokens


@pytest.mark.parametrize("deletes_elsewhere", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_the_same_name_given_once_more_brings_nothing_back(
    new_memory: NewMemory, deletes_elsewhere: bool, keeps: bool
) -> None:
    memory = new_memory()
    session = saved_session(memory)
    (new_memory() if deletes_elsewhere else memory).delete("alice")
    if keeps:
        memory.keep(session, "alice")
    else:
        rename(session, "alice")
    with pytest.raises(SessionDeleted):
        session.save()
    assert memory.store is not None and memory.store.names() == []
    memory.keep(session, "alice", overwrite=True)
    session.save()
    assert new_memory().session("alice").tokens == session.tokens


def test_one_process_saves_as_often_as_it_likes(new_memory: NewMemory) -> None:
    session = saved_session(new_memory())
    for text in ("one", "two", "three"):
        session.append(text)
        session.save()
        session.save()
    resumed = new_memory().session("alice")
    resumed.append("four")
    resumed.save()
    assert new_memory().session("alice").tokens == resumed.tokens


def test_a_save_whose_cleaning_fails_is_a_save(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the next one would take it for somebody else's."""
    memory = Memory(engine, POLICY.with_changes(trigger_tokens=96, originals="host"), store=tmp_path)
    session = saved_session(memory, "An owl sat on an oak. " * 6)
    session.rewind(3)

    def refuse(*args: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(type(folder_of(memory.store).files), "rm_file", refuse)
        session.save()
    assert "not yours" in caplog.text
    session.append("More.")
    session.save()
    assert [*(tmp_path / "originals").iterdir()] == []


def test_a_session_that_another_process_deleted_is_not_brought_back(new_memory: NewMemory) -> None:
    session = saved_session(new_memory())
    new_memory().delete("alice")
    session.append("Still there?")
    with pytest.raises(SessionDeleted, match="was deleted since it was read or saved here"):
        session.save()
    assert new_memory().names() == []
    session.save(overwrite=True)
    assert new_memory().session("alice").tokens == session.tokens


def test_a_file_that_is_no_session_is_not_overwritten(engine: TransformersEngine, tmp_path: Path) -> None:
    memory = Memory(engine, POLICY, store=tmp_path)
    session = memory.session("alice")
    session.append("Hello.")
    (tmp_path / "alice.safetensors").write_bytes(b"something else")
    with pytest.raises(SessionChanged):
        session.save()
    session.save(overwrite=True)


def test_nothing_of_a_refused_save_is_left(new_memory: NewMemory, url: str) -> None:
    originals = POLICY.with_changes(trigger_tokens=96, originals="host")
    saved_session(new_memory())
    memory = new_memory()
    memory.policy = originals
    mine, theirs = memory.session("alice"), new_memory().session("alice")
    theirs.append("They say so.")
    theirs.save()
    mine.append("I say this. " * 12)
    assert mine.stats.originals_bytes
    with pytest.raises(SessionChanged):
        mine.save()
    store = Store(url)
    assert [
        path
        for path in folder_of(store).files.find(folder_of(store).root)
        if "originals" in path or path.endswith(".tmp")
    ] == []


# Between the look and the deed


def test_who_comes_between_the_look_and_the_deed_is_seen(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other saves while this one has written everything, and its file has not yet taken its place."""
    memory = Memory(engine, POLICY, store=tmp_path)
    mine = saved_session(memory)
    theirs = Memory(engine, POLICY, store=tmp_path).session("alice")
    theirs.append("They say so.")
    rename_file = files._rename

    def theirs_first(*args: object) -> None:
        monkeypatch.setattr(files, "_rename", rename_file)
        theirs.save()
        rename_file(*args)

    mine.append("I say this.")
    monkeypatch.setattr(files, "_rename", theirs_first)
    with pytest.raises(SessionChanged):
        mine.save()
    assert Memory(engine, POLICY, store=tmp_path).session("alice").tokens == theirs.tokens


WRITER = dedent("""
    import importlib.util, sys
    from fsspec.implementations.local import LocalFileSystem

    spec = importlib.util.spec_from_file_location("files", "am_memory/storage/files.py")
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    path, count = sys.argv[1], int(sys.argv[2])
    here, written = LocalFileSystem(), 0
    while written < count:
        before = files.head_of(here, path)

        def check(head):
            if head != before:
                raise LookupError("somebody else was here")

        try:
            files.write(here, path, str(int(before or b"0") + 1).encode(), check)
        except LookupError:
            continue
        written += 1
""")


def counted(path: Path, count: int, num_processes: int) -> None:
    """Processes that each add one to a number, so and so often, all at once."""
    command = [sys.executable, "-c", WRITER, str(path), str(count)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(num_processes)]
    assert [process.wait(120) for process in processes] == [0] * num_processes


def test_no_update_of_several_processes_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "store" / "number"
    counted(path, count=40, num_processes=3)
    assert path.read_text() == "120"
    assert [*path.parent.iterdir()] == [path]


# Conversations: a branch's name says all that is in it


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def turned(threads: Threads, messages: list[dict[str, object]]) -> list[dict[str, object]]:
    turn = threads.turn(messages, thread="owls")
    text = "".join(piece.text for piece in turn.session.generate(4))
    turn.keep({"role": "assistant", "content": text})
    return [*messages, {"role": "assistant", "content": text}]


def test_two_processes_that_go_on_from_one_conversation_keep_both_ends(new_memory: NewMemory) -> None:
    begun = turned(Threads(new_memory()), [user("tell me")])
    servers = [Threads(new_memory()) for _ in range(2)]
    ends = [turned(server, [*begun, user(text)]) for server, text in zip(servers, ("left", "right"), strict=True)]
    ends = [turned(server, [*end, user("on")]) for server, end in zip(servers, ends, strict=True)]
    after = Threads(new_memory())
    for end in ends:
        turn = after.turn([*end, user("and?")], thread="owls")
        assert len(turn.session.tokens) - turn.num_cached_tokens < 40


def test_two_processes_that_say_the_same_keep_it(new_memory: NewMemory) -> None:
    servers = [Threads(new_memory()) for _ in range(2)]
    messages = [user("tell me")]
    for _ in range(2):
        one, other = (turned(server, messages) for server in servers)
        assert one == other
        messages = [*one, user("on")]
    assert Threads(new_memory()).names() == ["owls"]


def test_a_conversation_that_another_process_deleted_while_it_is_answered_does_not_come_back(
    new_memory: NewMemory,
) -> None:
    server, other = (Threads(new_memory()) for _ in range(2))
    messages = turned(server, [user("tell me")])
    turn = server.turn([*messages, user("on")], thread="owls")
    assert other.delete("owls")
    turn.keep({"role": "assistant", "content": "".join(piece.text for piece in turn.session.generate(4))})
    assert server.names() == other.names() == []
    later = turned(server, [user("hello")])
    assert server.turn([*later, user("on")], thread="owls").num_cached_tokens > 0


def said_in(threads: Threads) -> str:
    """All that lies in the store."""
    return str([threads.memory.load(name).messages for name in shared_of(threads.memory).require_store().names()])


def test_a_conversation_deleted_elsewhere_does_not_come_back_where_its_thread_was_begun_anew(
    new_memory: NewMemory,
) -> None:
    server, other = (Threads(new_memory()) for _ in range(2))
    messages = turned(server, [user("the owl's secret")])
    other.delete("owls")
    fresh = turned(other, [user("hello")])
    later = turned(server, [*messages, user("on")])
    assert [branch.session.messages for branch in server.branches("owls")] == []
    assert "secret" not in said_in(other)
    assert Threads(new_memory()).turn([*fresh, user("on")], thread="owls").num_cached_tokens > 0
    turned(server, [*later, user("once more")])
    assert "secret" in said_in(other)  # as it was told once more


def test_what_goes_on_from_a_deleted_answer_before_that_is_saved_does_not_come_back(new_memory: NewMemory) -> None:
    server, other = (Threads(new_memory()) for _ in range(2))
    messages = turned(server, [user("the owl's secret")])
    other.delete("owls")
    turned(other, [user("hello")])
    turns = []
    for text in ("on", "and on"):
        messages.append(user(text))
        turns.append(server.turn(messages, thread="owls"))
        answer = "".join(piece.text for piece in turns[-1].session.generate(4))
        messages.append({"role": "assistant", "content": answer})
        turns[-1].keep_in_memory(messages[-1])
    for turn in turns:
        turn.save()
    assert server.branches("owls") == []
    assert "secret" not in said_in(other)


def test_a_conversation_that_another_process_goes_on_with_is_kept_among_others(new_memory: NewMemory) -> None:
    server, other = (Threads(new_memory()) for _ in range(2))
    turned(other, [user("hello")])
    messages = turned(server, [user("the owl's secret")])
    for text in ("left", "more of it"):
        end = turned(other, [*messages, user(text)])
        turned(other, [*end, user("on")])
    turned(server, [*messages, user("right")])
    assert "right" in said_in(other)
    assert len(server.branches("owls")) >= 1


# The command line


def test_a_chat_whose_session_was_saved_elsewhere_goes_on_under_another_name(
    engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(engine, POLICY, store=tmp_path)
    monkeypatch.setattr(Memory, "from_pretrained", lambda *args, **options: memory)
    other = Memory(engine, POLICY, store=tmp_path)
    saved_session(other)
    chat = memory.session("alice")
    other.session("alice").append("They say so.")
    other.session("alice").save()
    result = CliRunner().invoke(app, ["chat", "--session", "alice", "--max-new-tokens", "2"], input="hello\n/quit\n")
    assert result.exit_code == 0
    assert "another process has saved alice meanwhile: this chat continues as alice-2" in result.output.replace(
        "\n", " "
    )
    assert "to continue: am-memory chat --session alice-2" in result.output
    again = Memory(engine, POLICY, store=tmp_path)
    assert again.session("alice").tokens == other.session("alice").tokens
    assert again.session("alice-2").tokens[: len(chat.tokens)] == chat.tokens
    assert again.session("alice-2").messages


def test_what_is_no_session_has_no_version() -> None:
    assert version_of(b"") == version_of(b'"sha256":"' + b"x" * 64) == version_of(b'"sha256":"0123') == ""
