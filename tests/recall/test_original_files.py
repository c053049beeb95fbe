"""Bytes on disk in one file without a name: each part stays what it is, and room is used again and given back."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import pytest

from am_memory.recall.original_files import Spill, spill


def test_parts_of_any_size_stay_what_they_are_while_others_come_and_go() -> None:
    file, chance = Spill(), random.Random(0)
    held: dict[int, bytes] = {}
    for _ in range(2000):
        if held and chance.random() < 0.5:
            start = chance.choice([*held])
            file.free(start, len(held.pop(start)))
        else:
            data = chance.randbytes(chance.randrange(1, 50))
            start = file.write(data)
            assert start not in held
            held[start] = data
        assert all(file.read(start, len(data)) == data for start, data in held.items())
        assert file.size == max((start + len(data) for start, data in held.items()), default=0)


def test_room_that_was_given_back_is_used_before_the_file_grows() -> None:
    file = Spill()
    starts = [file.write(bytes(10)) for _ in range(5)]
    file.free(starts[1], 10)
    file.free(starts[2], 10)
    assert file.write(bytes(20)) == starts[1]
    assert file.size == 50


def test_a_write_that_fails_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Spill()

    def full(*args: object) -> int:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "_put", full)
        with pytest.raises(OSError, match="no space left"):
            file.write(bytes(10))
    assert file.write(bytes(10)) == 0


def test_a_write_that_comes_in_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Spill._put
    monkeypatch.setattr(Spill, "_put", lambda file, data, start: real(file, data[:3], start))
    file = Spill()
    file.write(b"before")
    assert file.read(file.write(b"ten bytes!"), 10) == b"ten bytes!"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_of_the_process_takes_nothing_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = spill()
    start = file.write(b"the parent's")
    process = os.fork()
    if not process:
        file.free(start, 12)
        os._exit(file.size != 12 or spill() is file)
    assert os.waitpid(process, 0)[1] == 0
    assert file.read(start, 12) == b"the parent's"


def test_the_file_lies_where_temporary_files_go_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = spill()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert spill() is spill() is not first
