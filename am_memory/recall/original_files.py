"""Bytes on disk for as long as this process lives: one file for all of them, which has no name.

A file without a name is gone when its process has ended, however that came about, and nobody takes it for old and
deletes it. One for all, as a process may only have so many files open. Knows not what the bytes are.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import deque
from threading import Lock


class Spill:
    """A file in the folder for temporary files, and which parts of it are in use.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="am-memory-", buffering=0)  # noqa: SIM115
        self._process = os.getpid()
        self._lock = Lock()
        self._free: list[tuple[int, int]] = []  # from where to where, in order, with something in use between
        self._given_back: deque[tuple[int, int]] = deque()
        self._end = 0

    @property
    def size(self) -> int:
        """What the file takes."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> int:
        """Keep some bytes; where they begin. Raises OSError where there is no room."""
        with self._lock:
            self._gather()
            start = self._take(len(data))
        try:
            left = memoryview(data)
            while left:
                left = left[self._put(left, start + len(data) - len(left)) :]
        except BaseException:
            self.free(start, len(data))
            raise
        return start

    def read(self, start: int, size: int) -> bytes:
        """What lies there, less where the file ends before that; raises OSError."""
        parts = []
        while size and (part := self._get(size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)

    def free(self, start: int, size: int) -> None:
        """Give room back, to others and at the end of the file to the disk; from anywhere, a destructor too."""
        if os.getpid() != self._process:  # a fork of the process that needs it
            return
        self._given_back.append((start, start + size))
        if self._lock.acquire(blocking=False):  # else whoever has it may be the thread that was interrupted by this
            try:
                self._gather()
            finally:
                self._lock.release()

    def _gather(self) -> None:
        while self._given_back:
            self._free = _merged([*self._free, self._given_back.popleft()])
        if self._free and self._free[-1][1] == self._end:
            self._end, _ = self._free.pop()
            self._file.truncate(self._end)

    def _take(self, size: int) -> int:
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        start, self._end = self._end, self._end + size
        return start

    if sys.platform == "win32":

        def _put(self, data: memoryview, start: int) -> int:
            with self._lock:
                self._file.seek(start)
                return self._file.write(data) or 0

        def _get(self, size: int, start: int) -> bytes:
            with self._lock:
                self._file.seek(start)
                return self._file.read(size) or b""
    else:  # at no position of the file's own, which a fork has as well

        def _put(self, data: memoryview, start: int) -> int:
            return os.pwrite(self._file.fileno(), data, start)

        def _get(self, size: int, start: int) -> bytes:
            return os.pread(self._file.fileno(), size, start)


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order, those that touch each other as one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return merged


_spills: dict[tuple[int, str], Spill] = {}
_making = Lock()


def spill() -> Spill:
    """That of this process, in what is the folder for temporary files now. Raises OSError where none can be made."""
    key = os.getpid(), tempfile.gettempdir()
    with _making:
        if key not in _spills:
            _spills[key] = Spill()
        return _spills[key]
