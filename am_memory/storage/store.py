"""Sessions on disk, or wherever fsspec reaches: one safetensors file each, written whole or not at all.

Owns how a session's name becomes a file's, and that of two who save the same one the second is told so. Knows no model,
and not what is in the file.

The exact entries of compacted spans, where they are kept, lie beside in `originals/`: a file for each span, named by
its digest and shared by all sessions that have it, with an empty file for each of these sessions. What has no such mark
any more is deleted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from typing import Literal
from urllib.parse import unquote_to_bytes
from weakref import WeakValueDictionary

import fsspec  # type: ignore[import-untyped]
import torch

from am_memory.errors import (
    AMMemoryError,
    CorruptSession,
    NewerFormat,
    OlderFormat,
    OriginalLost,
    SessionChanged,
    SessionDeleted,
    SessionNotFound,
    StorageError,
)
from am_memory.kv_cache.layers import TailState
from am_memory.recall.originals import LayerEntries, Original, Place, received
from am_memory.storage import files
from am_memory.storage.session_file import SavedOriginal, SavedSession, packed, unpacked, version_of

SUFFIX = ".safetensors"
MAX_PART_CHARS = 200
"""Of a file's name, where file systems take 255: a longer one is cut into folders."""
ORIGINALS, DIGEST_CHARS = "originals", 64
logger = logging.getLogger("am_memory")

ANY = "any"
"""In the place of a version: whatever is saved under that name, or nothing."""


class Store:
    """Saved sessions in one folder.

    Args:
        url: a local folder or any fsspec URL (s3://bucket/folder); made when first written to.

    Raises:
        StorageError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = re.sub(r"(//[^/:@]*:)[^/@]*@", r"\1***@", url)  # for people, so without a password
        with self._reaching("open"):
            self._files, self._root = fsspec.url_to_fs(url)
        self._loaded: WeakValueDictionary[tuple[SavedOriginal, Place], Original] = WeakValueDictionary()
        self._is_swept = False

    def save(
        self,
        name: str,
        saved: SavedSession,
        *,
        replaces: str | None = ANY,
        in_doubt: str | None = None,
        on_version: Callable[[str], None] = lambda version: None,
        data: bytes | None = None,
    ) -> str:
        """Put this session in place of the saved one, which stays if anything fails.

        Args:
            replaces: the version that it went on from, None where there was none: another is not overwritten. On this
                machine that is certain. Elsewhere, where files have no locks, it is looked at just before.
            in_doubt: another version that may be overwritten: what an earlier save, interrupted, was to write.
            on_version: told which version this will be, before it can be there.
            data: what `packed` has made of it; None: it is packed now.

        Returns:
            The version that it is saved as.

        Raises:
            SessionChanged: another version is saved.
            SessionDeleted: none is any more.
            OriginalLost: some of the originals are not what they were; without these it can be saved.
            StorageError: the store cannot be written to, or a message holds what JSON cannot.
        """
        data = packed(saved) if data is None else data
        version = version_of(data[: files.HEAD_BYTES])

        def check(head: bytes | None) -> None:
            found = None if head is None else version_of(head)
            if replaces not in (ANY, found) and (found is None or found != in_doubt):
                self._refuse(name, found, replaces)

        with self._reaching("read"):
            check(files.head_of(self._files, self._path(name)))
        if not self._is_swept:
            self._sweep()
        held, mark = self._held_originals(), _mark(name)
        for original in saved.originals:
            entries = None if (original.digest, "") in held else original.packed()
            if (original.digest, mark) not in held:
                self._write(self._original(original.digest, mark), b"")
            if entries is not None:
                self._write(self._original(original.digest), entries)
        on_version(version)
        self._write(self._path(name), data, check)
        try:
            self._drop_originals(held, mark, {original.digest for original in saved.originals})
        except StorageError as error:  # saved it is; the next save tries again
            logger.warning("%s", error)
        return version

    def _refuse(self, name: str, found: str | None, replaces: str | None) -> None:
        if found is None:
            raise SessionDeleted(
                f"session {name!r} in {self.url!r} was deleted since it was read or saved here, so it is not saved: "
                "save it under another name, or with overwrite=True, if it is to stay after all"
            )
        since = "another is saved by now" if replaces is None else "it was saved by somebody else since"
        raise SessionChanged(
            f"session {name!r} in {self.url!r} is not the one that this one went on from: {since}. Nothing is lost: "
            "save this one under another name (Memory.keep(session, NAME), then session.save()), or with "
            "overwrite=True in place of the other"
        )

    def _write(self, path: str, data: bytes, check: files.Check = files.unchecked) -> None:
        """Whole, or not at all."""
        with self._reaching("write to"):
            files.write(self._files, path, data, check)

    def _sweep(self) -> None:
        """Take away what processes that were killed were writing, which holds text of conversations."""
        with self._reaching("clean"):
            for folder in (self._root, self._originals):
                for _, path in self._entries(folder):
                    if files.is_temporary(path):
                        files.delete_abandoned(self._files, path)
        self._is_swept = True

    def _original(self, digest: str, mark: str = "") -> str:
        return f"{self._originals}/{digest}{mark}{SUFFIX}"

    @property
    def _originals(self) -> str:
        return f"{self._root.rstrip('/')}/{ORIGINALS}"

    def _held_originals(self) -> set[tuple[str, str]]:
        """(digest, mark) of all files that hold originals, whose mark is empty, or say who needs them."""
        with self._reaching("list"):
            self._files.invalidate_cache()
            try:
                paths = self._files.ls(self._originals, detail=False)
            except FileNotFoundError:
                return set()
        names = [path.rpartition("/")[2].removesuffix(SUFFIX) for path in paths if path.endswith(SUFFIX)]
        return {(name[:DIGEST_CHARS], name[DIGEST_CHARS:]) for name in names}

    def _drop_originals(self, held: set[tuple[str, str]], mark: str, needed: Collection[str] = ()) -> None:
        """Take away a session's marks but those of what it needs, and what nobody else has marked."""
        gone = {digest for digest, whose in held if whose == mark and digest not in needed}
        others = {digest for digest, whose in held if whose not in ("", mark)}
        with self._reaching("delete from"):
            for digest in gone:
                for path in [self._original(digest, mark), *([] if digest in others else [self._original(digest)])]:
                    with suppress(FileNotFoundError):
                        self._files.rm_file(path)

    def with_originals(self, saved: SavedSession, place: Place) -> SavedSession:
        """A loaded session with its originals, but those that are not there any more or not what was written.

        Args:
            place: where they go.

        Raises:
            StorageError: the store cannot be read, or the place not be written to.
        """
        found, lost = [], list(saved.lost)
        like = [
            (layer.buffer.key[0], layer.buffer.value[0])
            for layer in saved.state.layers
            if isinstance(layer, TailState) and layer.buffer is not None
        ]
        for each in saved.left_out:
            try:
                found.append(self._load_original(each, like, place))
            except OriginalLost as error:
                lost.append((each, str(error)))
        return replace(saved, originals=tuple(found), left_out=(), lost=tuple(lost))

    def _load_original(self, which: SavedOriginal, like: Sequence[LayerEntries], place: Place) -> Original:
        known = self._loaded.get((which, place))
        if known is not None and known.lost is None:
            return known
        path = self._original(which.digest)
        with self._reaching("read"):
            head = files.head_of(self._files, path)
            data: bytes | None = None if head is None else self._files.cat_file(path)
        if data is None:
            raise OriginalLost(f"{path} is not there any more")
        if sha256(data).hexdigest() != which.digest:
            raise OriginalLost(f"{path} is not what was written: restore it from a copy before the session is saved")
        original = self._loaded[which, place] = received(which.start, which.end, data, like, place)
        return original

    def load(
        self,
        name: str,
        *,
        device: torch.device | str | None = None,
        originals: Literal["drop", "host", "disk"] = "host",
    ) -> SavedSession:
        """The session as it was saved, with its cache on `device` (None: the CPU).

        Args:
            originals: where the exact entries of compacted tokens go; "drop": they stay where they are, for
                `with_originals`.

        Raises:
            SessionNotFound: there is none of that name.
            CorruptSession: the file is not what was written.
            NewerFormat, OlderFormat: another version of this project wrote it.
            StorageError: the store cannot be read.
        """
        target = torch.device(device or "cpu")
        where = f"session {name!r} in {self.url!r}"
        if not self.exists(name):
            raise SessionNotFound(f"no {where}; there are: {', '.join(self.names()) or 'none'}")
        with self._reaching("read"):
            data: bytes = self._files.cat_file(self._path(name))
        try:
            saved = unpacked(data, target)
        except (NewerFormat, OlderFormat) as error:
            raise type(error)(f"{where} has {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSession(
                f"{where} cannot be read: {error}; restore {self._path(name)} from a copy, or delete it"
            ) from error
        return saved if originals == "drop" else self.with_originals(saved, originals)

    def exists(self, name: str) -> bool:
        """Whether a session of that name is saved; raises StorageError where that cannot be known."""
        with self._reaching("read"):  # unlike fsspec's own `exists`, for which all that fails is not there
            self._files.invalidate_cache()
            try:
                self._files.info(self._path(name))
            except FileNotFoundError:
                return False
            return True

    def names(self) -> list[str]:
        """Of all saved sessions, in order."""
        with self._reaching("list"):
            names = (_name(text.removesuffix(SUFFIX)) for text, _ in self._entries(self._root) if text.endswith(SUFFIX))
            return sorted(name for name in names if name is not None)

    def delete(self, name: str) -> None:
        """Forget the session of that name, if there is one; whether it can be read does not matter."""
        with self._reaching("delete from"):
            path = self._path(name)
            files.delete(self._files, path)
            while (path := path.rpartition("/")[0]) != self._root.rstrip("/"):
                with suppress(OSError):  # another name begins like this one
                    self._files.rmdir(path)
        self._drop_originals(self._held_originals(), _mark(name))
        self._sweep()

    @contextmanager
    def _reaching(self, action: str) -> Iterator[None]:
        try:
            yield
        except AMMemoryError:
            raise
        except Exception as error:  # broadly: every file system has its own, and nothing else runs in here
            raise StorageError(
                f"cannot {action} the store {self.url!r}: {type(error).__name__}: {error}; "
                "check its address, your access rights and the space that is left"
            ) from error

    def _path(self, name: str) -> str:
        text = _encoded(name)
        parts = [text[start : start + MAX_PART_CHARS] for start in range(0, len(text) or 1, MAX_PART_CHARS)]
        return "/".join([self._root.rstrip("/"), *parts]) + SUFFIX

    def _entries(self, folder: str, before: str = "") -> Iterator[tuple[str, str]]:
        """Name and path of every file, one that was cut into folders as it was before."""
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(folder, detail=True)
        except FileNotFoundError:
            return
        for entry in entries:
            text = before + entry["name"].rpartition("/")[2]
            if entry["type"] != "directory":
                yield text, entry["name"]
            elif len(text) == len(before) + MAX_PART_CHARS:
                yield from self._entries(entry["name"], text)


def _encoded(name: str) -> str:
    """Percent-encoded, capitals as well: not every file system tells them from small letters."""
    data = name.encode("utf-8", "surrogatepass")
    return re.sub(rb"[^a-z0-9._-]", lambda found: b"%%%02x" % ord(found[0]), data).decode()


def _name(encoded: str) -> str | None:
    """The inverse; None for what was not encoded so."""
    try:
        name = unquote_to_bytes(encoded).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return None
    return name if _encoded(name) == encoded else None


def _mark(name: str) -> str:
    """Of a session, behind the digest of what it needs."""
    return f".{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"
