"""Bytes on disk that live as long as this process, all in one unnamed temporary file.

The system deletes an unnamed file when its process ends, even after a crash, and no cleanup job deletes it before. One
file holds everything, because the number of open files is limited. Does not know what the bytes are.
"""

from __future__ import annotations

import os
import sys
import tempfile
import weakref
from collections import deque
from threading import Lock


class Spill:
    """An unnamed temporary file, and a list of its parts that are free.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="am-memory-", buffering=0)  # noqa: SIM115
        self._process = os.getpid()
        self._lock = Lock()
        self._free: list[tuple[int, int]] = []  # (start, end) of each free part, in order; none touch
        self._given_back: deque[tuple[int, int]] = deque()
        self._end = 0

    @property
    def size(self) -> int:
        """Bytes that the file takes on disk."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, data: bytes) -> int:
        """Write bytes to a free part, and return its start; raises OSError if the disk is full."""
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
        """Up to `size` bytes from `start`, fewer at the end of the file; raises OSError."""
        parts = []
        while size and (part := self._get(size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return b"".join(parts)

    def free(self, start: int, size: int) -> None:
        """Free a part for others, and shorten the file if it is at its end. Safe to call in a destructor."""
        if os.getpid() != self._process:  # a forked process: its parent still uses the file
            return
        self._given_back.append((start, start + size))
        if self._lock.acquire(blocking=False):  # the holder may be this thread, interrupted by a destructor
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
    else:  # positioned reads and writes: a forked process shares the file's own position

        def _put(self, data: memoryview, start: int) -> int:
            return os.pwrite(self._file.fileno(), data, start)

        def _get(self, size: int, start: int) -> bytes:
            return os.pread(self._file.fileno(), size, start)


def _merged(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts in order, with touching parts joined."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(parts):
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], end
        else:
            merged.append((start, end))
    return merged


class FilePart:
    """Bytes in the file of this process. Their room is freed when this object ends.

    Args:
        data: bytes to write.

    Raises:
        OSError: they cannot be written.
    """

    def __init__(self, data: bytes) -> None:
        self.file, self.nbytes = spill(), len(data)
        self.offset = self.file.write(data)
        weakref.finalize(self, self.file.free, self.offset, self.nbytes).atexit = False  # the file ends at exit

    def read(self) -> bytes:
        """The bytes, fewer if the file was cut; raises OSError."""
        return self.file.read(self.offset, self.nbytes)


_spills: dict[tuple[int, str], Spill] = {}
_making = Lock()


def spill() -> Spill:
    """The file of this process in the current folder for temporary files; raises OSError if it cannot be created."""
    key = os.getpid(), tempfile.gettempdir()
    with _making:
        if key not in _spills:
            _spills[key] = Spill()
        return _spills[key]
