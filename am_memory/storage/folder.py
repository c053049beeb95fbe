"""A folder in any file system that fsspec reaches. Every failure is a StorageError that names the folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import fsspec  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from am_memory.errors import AMMemoryError, StorageError
from am_memory.storage import files


class Folder:
    """A local folder, or one on a server.

    Args:
        url: a path or any fsspec URL (s3://bucket/folder). The folder is made when it is first written to.

    Attributes:
        url: for messages, with any password hidden.
        root: the folder's path inside its file system.

    Raises:
        StorageError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = re.sub(r"(//[^/:@]*:)[^/@]*@", r"\1***@", url)
        with self.reaching("open"):
            self.files, self.root = fsspec.url_to_fs(url)

    @contextmanager
    def reaching(self, action: str) -> Iterator[None]:
        """Turn every failure inside the block into a StorageError: each file system has errors of its own."""
        try:
            yield
        except AMMemoryError:
            raise
        except Exception as error:
            raise StorageError(
                f"cannot {action} the store {self.url!r}: {type(error).__name__}: {error}; "
                "check its address, your access rights and the free space"
            ) from error

    @property
    def is_local(self) -> bool:
        """Whether it is a folder of this machine."""
        return isinstance(self.files, LocalFileSystem)

    def path(self, name: str) -> str:
        """The path of a file or folder in it."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, path: str) -> bool:
        """Whether there is a file; unlike fsspec's own `exists`, it raises where that cannot be known."""
        with self.reaching("read"):
            self.files.invalidate_cache()
            try:
                self.files.info(path)
            except OSError as error:
                if files.is_missing(error):
                    return False
                raise
            return True

    def head(self, path: str) -> bytes | None:
        """The first bytes of a file; None where there is none."""
        with self.reaching("read"):
            return files.head_of(self.files, path)

    def read(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of a file, or those from `start` to `end`."""
        with self.reaching("read"):
            data: bytes = self.files.cat_file(path, start=start, end=end)
            return data

    def write(self, path: str, data: bytes, check: files.Check = files.unchecked) -> None:
        """Write a file whole, or not at all; see `files.write`."""
        with self.reaching("write to"):
            files.write(self.files, path, data, check)

    def entries(self, path: str) -> list[tuple[str, str, bool]]:
        """(name, path, is a folder) of everything directly in a folder; nothing if there is no such folder."""
        self.files.invalidate_cache()
        try:
            entries = self.files.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return [(entry["name"].rpartition("/")[2], entry["name"], entry["type"] == "directory") for entry in entries]

    def delete(self, path: str) -> None:
        """Delete a file if it is there, and the folders above it that are empty then."""
        with self.reaching("delete from"):
            files.delete(self.files, path)
            while (path := path.rpartition("/")[0]) != self.root.rstrip("/"):
                with suppress(OSError):  # the folder holds other files
                    self.files.rmdir(path)
