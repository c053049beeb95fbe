"""The exact entries of compacted spans in a store: one file for each span, shared by all sessions that have it.

A span's file is named by the digest of its bytes. Each session that needs it adds a mark, an empty file beside it. A
file without any mark is deleted. Knows no session but its mark.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from hashlib import sha256
from weakref import WeakValueDictionary

from am_memory.errors import OriginalLost
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import KeysAndValues, Original, Place
from am_memory.storage.folder import Folder
from am_memory.storage.session_file import SavedOriginal

FOLDER, SUFFIX, DIGEST_CHARS = "originals", ".safetensors", 64

Held = Collection[tuple[str, str]]
"""(digest, mark) of the files that are there; the mark is empty for the entries themselves."""


def mark_of(name: str) -> str:
    """The mark of a session, which follows the digest of everything that the session needs."""
    return f".{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


class SavedOriginals:
    """The originals that are saved in a store's folder."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.path = folder.path(FOLDER)
        self._loaded: WeakValueDictionary[tuple[SavedOriginal, OriginalStore], Original] = WeakValueDictionary()

    def held(self) -> Held:
        """Everything that is there."""
        with self._folder.reaching("list"):
            names = [
                name.removesuffix(SUFFIX) for name, _, _ in self._folder.entries(self.path) if name.endswith(SUFFIX)
            ]
        return {(name[:DIGEST_CHARS], name[DIGEST_CHARS:]) for name in names}

    def write(self, originals: Iterable[Original], mark: str, held: Held) -> None:
        """Write and mark the originals that a session needs, as far as they are not `held`.

        Raises:
            OriginalLost: some of them are not what was kept.
        """
        for original in originals:
            entries = None if (original.digest, "") in held else original.packed()
            if (original.digest, mark) not in held:  # first, so that nobody deletes the entries as unmarked
                self._folder.write(self._path(original.digest, mark), b"")
            if entries is not None:
                self._folder.write(self._path(original.digest), entries)

    def unmark(self, mark: str, held: Held, needed: Collection[str] = ()) -> None:
        """Delete a session's marks except on the digests it needs; delete the entries that then have no mark."""
        unneeded = {digest for digest, whose in held if whose == mark and digest not in needed}
        others = {digest for digest, whose in held if whose not in ("", mark)}
        paths = [self._path(digest, mark) for digest in unneeded]
        paths += [self._path(digest) for digest in unneeded - others]
        with self._folder.reaching("delete from"):
            for path in paths:
                with suppress(FileNotFoundError):
                    self._folder.files.rm_file(path)

    def load(
        self, saved: SavedOriginal, like: Sequence[KeysAndValues], original_store: OriginalStore, place: Place
    ) -> Original:
        """Read the entries of one span; those that `original_store` has read before are shared.

        Args:
            like: entries of the same layers, to check shapes and dtypes with.
            original_store, place: where the entries are kept from now on.

        Raises:
            OriginalLost: the file is missing or was altered.
            StorageError: the store cannot be read.
        """
        known = self._loaded.get((saved, original_store))
        if known is not None and known.lost is None:
            return known
        path = self._path(saved.digest)
        if self._folder.head(path) is None:
            raise OriginalLost(f"{path} is missing")
        data = self._folder.read(path)
        if sha256(data).hexdigest() != saved.digest:
            raise OriginalLost(f"{path} was altered: restore it from a copy before the session is saved")
        original = original_store.received(saved.start, saved.end, data, like, place)
        self._loaded[saved, original_store] = original
        return original

    def _path(self, digest: str, mark: str = "") -> str:
        return f"{self.path}/{digest}{mark}{SUFFIX}"
