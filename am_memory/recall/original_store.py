"""The originals of all sessions of one memory, within one bound on host memory and one on disk.

When host memory is full, the least recently used originals move to disk. When the disk is full, the least recently
used there are dropped. Those that are saved in a folder need neither: they are read from there. It holds originals
weakly: they end with the last session that has them.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Lock
from weakref import WeakSet

from am_memory.errors import OriginalLost, require_whole
from am_memory.formatting import mebibytes
from am_memory.recall.originals import (
    DiskEntries,
    Entries,
    HostEntries,
    KeysAndValues,
    Loss,
    Original,
    Place,
    cut,
    num_bytes,
    packed,
)
from am_memory.recall.search_index import index_bytes

ORIGINAL_TOKENS = 256
"""The most tokens of one original. Each is read from disk, moved and dropped as a whole."""
HOST_SHARE, DISK_SHARE = 1 / 8, 1 / 4
"""Default bounds: shares of the machine's memory, and of what is free where temporary files go."""
UNKNOWN_MACHINE_BYTES = 16 * 2**30
"""Assumed memory of a machine that does not tell."""
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files that hold the memory limit of a container."""


class OriginalStore:
    """Makes originals, and keeps the bytes of all of them within two bounds. Threads may share it.

    Args:
        host_bytes: bound on host memory. None: an eighth of the memory of the machine, or of its container.
        disk_bytes: bound on the folder for temporary files. None: a quarter of what is free there now.

    Raises:
        InvalidInput: a bound is not a whole number, or is below 0.
    """

    def __init__(self, host_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        self.host_bytes = int(HOST_SHARE * machine_bytes()) if host_bytes is None else host_bytes
        self.disk_bytes = int(DISK_SHARE * free_disk_bytes()) if disk_bytes is None else disk_bytes
        require_whole(0, originals_bytes=self.host_bytes, originals_disk_bytes=self.disk_bytes)
        self._originals: WeakSet[Original] = WeakSet()
        self._lock = Lock()

    def __repr__(self) -> str:
        held = (f"{mebibytes(self.bytes_in(place))} {place}" for place in ("host", "disk"))
        return f"OriginalStore({', '.join(held)})"

    def bytes_in(self, place: Place) -> int:
        """Bytes that all originals take there now; on the host, with the keys by which they are searched."""
        with self._lock:
            return self._taken(place)

    def keep(self, start: int, end: int, entries: Iterable[KeysAndValues], place: Place) -> tuple[Original, ...]:
        """Copy the exact entries of the tokens [start, end), as originals of up to `ORIGINAL_TOKENS` tokens.

        Args:
            entries: of each compactable layer.
            place: "host": to host memory, and to disk what has no room there. "disk": to disk at once.

        Returns:
            In the order of the tokens. What has no room anywhere, or cannot be written, is lost already.
        """
        entries, num_tokens = list(entries), end - start
        count = math.ceil(num_tokens / ORIGINAL_TOKENS)
        edges = [num_tokens * index // count for index in range(count + 1)]
        return tuple(
            self.add(start + first, start + last, cut(entries, first, last), place) for first, last in pairwise(edges)
        )

    def without_drops(self) -> OriginalStore:
        """A store with the same bound on host memory and none on disk, for a while; then `adopt` what it made."""
        return OriginalStore(self.host_bytes, sys.maxsize)

    def adopt(self, originals: Iterable[Original]) -> None:
        """Hold originals that another store made, within the bounds of this one."""
        with self._lock:
            self._originals.update(originals)
            for place in ("host", "disk"):
                self._make_room(place, 0)

    def take_out(self, original: Original) -> None:
        """Copy an original that is in a saved folder only, before it is deleted there."""
        if original.place == "store":
            with suppress(OriginalLost):
                layers = original.layers()
                with self._lock:
                    original.replace(self._kept(layers, "host"))
                    self._originals.add(original)

    def add(self, start: int, end: int, entries: Sequence[KeysAndValues], place: Place) -> Original:
        """Copy the exact entries of the tokens [start, end) as one original; see `keep`."""
        with self._lock:
            original = Original(start, end, self._kept(entries, place))
            self._originals.add(original)
            return original

    def _kept(self, entries: Sequence[KeysAndValues], place: Place) -> Entries | Loss:
        if place == "host" and self._make_room("host", num_bytes(entries)):
            return HostEntries.copied(entries)
        return self._written(packed(entries))

    def _written(self, data: bytes) -> Entries | Loss:
        """Write packed entries to disk, and make the room for them."""
        if not self._make_room("disk", len(data)):
            return self._no_room()
        try:
            return DiskEntries.written(data)
        except OSError as error:
            return Loss(
                f"{mebibytes(len(data))} cannot be written to the folder for temporary files: {error}; set TMPDIR to a "
                "folder with room"
            )

    def _make_room(self, place: Place, size: int) -> bool:
        """Move or drop the least recently used originals until `size` bytes fit; False: they never do.

        What is saved needs no room: it is read from its store. Search keys stay in host memory, whatever the bound.
        """
        bound = self.host_bytes if place == "host" else self.disk_bytes
        held, taken = self._in(place), self._taken(place)
        fixed = taken - sum(original.nbytes for original in held)
        if fixed + size > bound and size:
            return False
        excess = taken + size - bound
        for original in sorted(held, key=lambda original: original.last_use) if excess > 0 else ():
            if excess <= 0:
                break
            excess -= original.nbytes
            if original.backup is not None and original.backup.is_there:
                original.replace(original.backup)
            else:
                original.replace(self._written(original.packed()) if place == "host" else self._no_room())
        return True

    def _taken(self, place: Place) -> int:
        held = sum(original.nbytes for original in self._in(place))
        return held + index_bytes(self._originals) if place == "host" else held

    def _in(self, place: Place) -> list[Original]:
        return [original for original in self._originals if original.place == place]

    def _no_room(self) -> Loss:
        reason = (
            f"there is no room for them within the memory's originals_bytes ({mebibytes(self.host_bytes)}) and "
            f"originals_disk_bytes ({mebibytes(self.disk_bytes)}): raise one of the two"
        )
        return Loss(reason, is_dropped=True)


def machine_bytes() -> int:
    """The memory of this machine, or of the container if that has less."""
    found = []
    with suppress(AttributeError, OSError, ValueError):  # there is no sysconf on Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # "max" where there is no limit
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found, default=UNKNOWN_MACHINE_BYTES)


def free_disk_bytes() -> int:
    """Bytes that are free where temporary files go; 0 where there is no such folder."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0
