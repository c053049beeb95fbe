"""Names as names of files: any name becomes a path in a folder, and back. Knows no content."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from am_memory.storage.folder import Folder

SUFFIX = ".safetensors"
MAX_PART_CHARS = 200
"""Longest part of a file's name; file systems take 255. A longer name is cut into folders."""


class NamedFiles:
    """The files of one folder, each under a name.

    Args:
        folder: holds it.
        root: the path of the folder inside its file system.
    """

    def __init__(self, folder: Folder, root: str) -> None:
        self._folder, self.root = folder, root.rstrip("/")

    def path(self, name: str) -> str:
        """The path of the file of that name."""
        text = _encoded(name)
        parts = [text[start : start + MAX_PART_CHARS] for start in range(0, len(text) or 1, MAX_PART_CHARS)]
        return f"{self.root}/{'/'.join(parts)}{SUFFIX}"

    def names(self) -> list[str]:
        """The names of all files, in order."""
        with self._folder.reaching("list"):
            texts = [text for text, _ in self.files() if text.endswith(SUFFIX)]
        names = [_name(text.removesuffix(SUFFIX)) for text in texts]
        return sorted(name for name in names if name is not None)

    def files(self, folder: str | None = None, beginning: str = "") -> Iterator[tuple[str, str]]:
        """Name and path of every file; a name that was cut into folders is whole again."""
        for text, path, is_folder in self._folder.entries(self.root if folder is None else folder):
            if not is_folder:
                yield beginning + text, path
            elif len(text) == MAX_PART_CHARS:
                yield from self.files(path, beginning + text)


def _encoded(name: str) -> str:
    """A name as the name of a file, percent-encoded; capitals too, as some file systems do not distinguish them."""
    data = name.encode("utf-8", "surrogatepass")
    return re.sub(rb"[^a-z0-9._-]", lambda found: b"%%%02x" % ord(found[0]), data).decode()


def _name(encoded: str) -> str | None:
    """The inverse of `_encoded`; None for a text that it cannot give."""
    try:
        name = unquote_to_bytes(encoded).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return name if _encoded(name) == encoded else None
