"""Files that take their place whole or not at all, in folders that several processes write to, here or elsewhere.

Owns what lies in a folder while a file is written, and what a process that was killed has left of it. Knows no session.

A file is written beside its place, locked by its writer, and then put there, which on this machine happens under a lock
on the file that it replaces: of two writers, the second sees what the first has done. Elsewhere there are no locks:
what lies there is looked at just before, and who writes within that moment is not seen.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

if sys.platform != "win32":
    import fcntl

HEAD_BYTES = 1024
ABANDONED_SECONDS = 24 * 3600
"""Where nobody can lock a file: no upload takes so long."""
_TEMPORARY = re.compile(r"\.(?:([0-9a-f]{1,16})-)?[0-9a-f]{8}\.tmp$")

Check = Callable[[bytes | None], None]
"""Called with the first bytes of what lies in a file's place, None where there is nothing; raises to leave it there."""


def unchecked(head: bytes | None) -> None:
    """Whatever lies there may be replaced."""


def write(files: Any, path: str, data: bytes, check: Check = unchecked) -> None:
    """Put a file in its place, whole; where anything fails, what was there before stays.

    Args:
        files: a file system of fsspec.
        check: of what is replaced; what it raises is raised.
    """
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    temporary = f"{path}.{int(time.time()):x}-{secrets.token_hex(4)}.tmp"
    try:
        if isinstance(files, LocalFileSystem):
            with _locked_anew(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                _take_place(temporary, path, check)
        else:
            files.pipe_file(temporary, data)
            check(head_of(files, path))
            files.mv(temporary, path)
    except BaseException:
        with suppress(OSError):
            files.rm_file(temporary)
        raise


def delete(files: Any, path: str) -> None:
    """Take a file away, if it is there; whoever is about to replace it has done so, or finds it gone."""
    if isinstance(files, LocalFileSystem):
        try:
            with _held(path), suppress(FileNotFoundError):
                os.unlink(path)
        except PermissionError:  # it may be taken away all the same: that is a matter of its folder
            os.unlink(path)
    else:
        with suppress(FileNotFoundError):
            files.rm_file(path)


def head_of(files: Any, path: str) -> bytes | None:
    """The first bytes of a file; None where there is none."""
    files.invalidate_cache()
    try:
        head: bytes = files.cat_file(path, start=0, end=HEAD_BYTES)
    except FileNotFoundError:
        return None
    return head


def is_temporary(path: str) -> bool:
    """Whether a file is one that is being written, or was."""
    return _TEMPORARY.search(path) is not None


def delete_abandoned(files: Any, temporary: str) -> None:
    """Take away what a killed process has left of a file; what somebody may be writing stays."""
    if isinstance(files, LocalFileSystem):
        with suppress(FileNotFoundError), open(temporary, "r+b") as file:
            if _lock(file, waits=False):
                os.unlink(temporary)
    else:
        found = _TEMPORARY.search(temporary)
        if found is not None and found[1] is not None and time.time() - int(found[1], 16) > ABANDONED_SECONDS:
            with suppress(FileNotFoundError):
                files.rm_file(temporary)


@contextmanager
def _locked_anew(path: str) -> Iterator[BinaryIO]:
    """A new file with a lock on it, so that nobody takes it for abandoned."""
    while True:
        with open(path, "xb") as file:
            _lock(file)
            if os.fstat(file.fileno()).st_nlink:  # else somebody took it away before it was locked
                yield file
                return


def _take_place(temporary: str, path: str, check: Check) -> None:
    while True:
        with _held(path) as held:
            check(None if held is None else held.read(HEAD_BYTES))
            if held is not None:
                os.replace(temporary, path)
                return
            try:
                os.link(temporary, path)  # unlike `replace`, it fails where somebody else was first
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                os.replace(temporary, path)
            else:
                os.unlink(temporary)
            return


@contextmanager
def _held(path: str) -> Iterator[BinaryIO | None]:
    """The file at a path, locked while it is there; None where there is none, or none that can be opened."""
    while True:
        try:
            file = open(path, "r+b")  # to be written, as some file systems lock no other  # noqa: SIM115
        except FileNotFoundError:
            yield None
            return
        with file:
            _lock(file)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: BinaryIO, path: str) -> bool:
    """Whether nobody has put another file in its place, or taken it away."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, *, waits: bool = True) -> bool:
    """Lock a file until it is closed; whether that was done. Where there are no locks, it is not."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
