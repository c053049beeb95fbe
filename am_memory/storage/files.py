"""Files that are written whole or not at all, in folders that several processes write to.

Owns temporary files, those of killed processes included. Knows no session.

A file is written under a temporary name, locked by its writer, and then renamed. On a local disk the rename happens
under a lock on the file that it replaces, so the second of two writers sees the first one's file. Other file systems
have no locks: the present file is read just before the rename, and a writer in that moment goes unnoticed.
"""

from __future__ import annotations

import errno
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
"""Age of a temporary file that belongs to a killed process, where files cannot be locked: no upload takes so long."""
_TEMPORARY = re.compile(r"\.(?:([0-9a-f]{1,16})-)?[0-9a-f]{8}\.tmp$")

Check = Callable[[bytes | None], None]
"""Called with the first bytes of the file to be replaced, None if there is none. It raises to keep that file."""


def unchecked(head: bytes | None) -> None:
    """The check that allows any file to be replaced."""


def write(files: Any, path: str, data: bytes, check: Check = unchecked) -> None:
    """Write a file whole; if anything fails, the file before it stays.

    Args:
        files: a file system of fsspec.
        check: decides whether the present file may be replaced. Its errors are raised.
    """
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    temporary = f"{path}.{int(time.time()):x}-{secrets.token_hex(4)}.tmp"
    try:
        if isinstance(files, LocalFileSystem):
            with _new_locked_file(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                _rename(temporary, path, check)
        else:
            files.pipe_file(temporary, data)
            check(head_of(files, path))
            files.mv(temporary, path)
    except BaseException:
        with suppress(OSError):
            files.rm_file(temporary)
        raise


def delete(files: Any, path: str) -> None:
    """Delete a file, if it is there. A writer that is about to replace it either finishes first or finds it deleted."""
    if isinstance(files, LocalFileSystem):
        try:
            with _held(path), suppress(FileNotFoundError):
                os.unlink(path)
        except PermissionError:  # it cannot be locked, but deleting needs rights on its folder only
            os.unlink(path)
    else:
        with suppress(FileNotFoundError):
            files.rm_file(path)


def head_of(files: Any, path: str) -> bytes | None:
    """The first bytes of a file; None where there is none."""
    files.invalidate_cache()
    try:
        head: bytes = files.cat_file(path, start=0, end=HEAD_BYTES)
    except OSError as error:
        if is_missing(error):
            return None
        raise
    return head


def is_missing(error: OSError) -> bool:
    """Whether an error says that there is no such file; the file system has none of a path that is too long for it."""
    return isinstance(error, FileNotFoundError) or error.errno == errno.ENAMETOOLONG


def is_temporary(path: str) -> bool:
    """Whether a file has a temporary name."""
    return _TEMPORARY.search(path) is not None


def delete_abandoned(files: Any, temporary: str) -> None:
    """Delete the temporary file of a killed process; a file that may still be written stays."""
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
def _new_locked_file(path: str) -> Iterator[BinaryIO]:
    """A new file with a lock on it, so that no process takes it for abandoned."""
    while True:
        with open(path, "xb") as file:
            _lock(file)
            if os.fstat(file.fileno()).st_nlink:  # else it was deleted before it was locked
                yield file
                return


def _rename(temporary: str, path: str, check: Check) -> None:
    while True:
        with _held(path) as held:
            check(None if held is None else held.read(HEAD_BYTES))
            if held is not None:
                os.replace(temporary, path)
                return
            try:
                os.link(temporary, path)  # unlike `replace`, it fails if another writer was first
            except FileExistsError:
                continue
            except OSError:  # a file system without links
                os.replace(temporary, path)
            else:
                os.unlink(temporary)
            return


@contextmanager
def _held(path: str) -> Iterator[BinaryIO | None]:
    """The file at a path, locked inside the block; None if there is none."""
    while True:
        try:
            file = open(path, "r+b")  # some file systems lock only files that are open for writing  # noqa: SIM115
        except FileNotFoundError:
            yield None
            return
        with file:
            _lock(file)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: BinaryIO, path: str) -> bool:
    """Whether the path still leads to this file: it was neither replaced nor deleted."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, *, waits: bool = True) -> bool:
    """Lock a file until it is closed. Returns False if it is locked already, or if there are no locks here."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
