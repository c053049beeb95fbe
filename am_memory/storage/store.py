"""Saved sessions in a folder, local or wherever fsspec reaches: one safetensors file each, written whole or not at all.

Owns how a session's name becomes the name of a file, and which saved version may be overwritten. Of two programs that
save the same session, the second gets an error. Knows no model, and not what is in the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from am_memory.errors import (
    CorruptSession,
    NewerFormat,
    OlderFormat,
    SessionChanged,
    SessionDeleted,
    SessionNotFound,
    StorageError,
)
from am_memory.kv_cache.layers import TailState
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import Place
from am_memory.storage import files
from am_memory.storage.file_names import NamedFiles
from am_memory.storage.folder import Folder
from am_memory.storage.saved_originals import SavedOriginals, mark_of
from am_memory.storage.saved_texts import SavedTexts
from am_memory.storage.session_file import SavedSession, packed, unpacked
from am_memory.storage.tensor_file import version_of

logger = logging.getLogger("am_memory")

ANY = "any"
"""In place of a version: any saved version, or none."""


class Store:
    """Saved sessions in one folder.

    Args:
        url: a local folder or any fsspec URL (s3://bucket/folder). It is made when it is first written to.

    Attributes:
        url: for messages, with any password hidden.
        texts: the compact texts in it.

    Raises:
        StorageError: an unknown protocol, or one whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        self._folder = Folder(url)
        self._files = NamedFiles(self._folder, self._folder.root)
        self._originals = SavedOriginals(self._folder)
        self.texts = SavedTexts(self._folder, self._originals)
        self._is_swept = False
        self.url = self._folder.url

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

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
        """Save a session in place of the saved one of that name, which stays if anything fails.

        Args:
            replaces: the version that the session went on from, None where there was none; no other version is
                overwritten. A lock guards this on a local disk. Elsewhere the version is read just before writing.
            in_doubt: another version that may be overwritten: the one that an interrupted save was writing.
            on_version: called with the new version before it can be in the store.
            data: the result of `packed(saved)`; None: it is packed now.

        Returns:
            The version under which it is saved.

        Raises:
            SessionChanged: another version is saved.
            SessionDeleted: no version is saved any more.
            OriginalLost: some originals are not what was kept; the session can be saved without them.
            StorageError: the store cannot be written to, or a message holds something that JSON cannot.
        """
        data = packed(saved) if data is None else data
        version, path = version_of(data[: files.HEAD_BYTES]), self._files.path(name)

        def check(head: bytes | None) -> None:
            found = None if head is None else version_of(head)
            if replaces not in (ANY, found) and (found is None or found != in_doubt):
                self._refuse(name, found, replaces)

        check(self._folder.head(path))
        if not self._is_swept:
            self._sweep()
        held, mark = self._originals.held(), mark_of(name)
        originals = [*saved.originals, *(original for _, text in saved.texts for original in text.originals)]
        self._originals.write(originals, mark, held)
        on_version(version)
        self._folder.write(path, data, check)
        try:
            self._originals.unmark(mark, held, {original.digest for original in originals})
        except StorageError as error:  # the session is saved; the next save tries again
            logger.warning("%s", error)
        return version

    def _refuse(self, name: str, found: str | None, replaces: str | None) -> None:
        if found is None:
            raise SessionDeleted(
                f"session {name!r} in {self.url!r} was deleted since it was read or saved here, so it is not saved: "
                "to keep it after all, save it under another name, or with overwrite=True"
            )
        since = "another one was saved meanwhile" if replaces is None else "another program saved it meanwhile"
        raise SessionChanged(
            f"the saved session {name!r} in {self.url!r} is not the one that this one went on from: {since}. "
            "Nothing is lost: save this one under another name (Memory.keep(session, NAME), then session.save()), or "
            "with overwrite=True in place of the other"
        )

    def load(
        self,
        name: str,
        *,
        device: torch.device | str | None = None,
    ) -> SavedSession:
        """Read a session, without its originals: `with_originals` reads them.

        Args:
            device: where its cache goes; None: the CPU.

        Raises:
            SessionNotFound: there is none of that name.
            CorruptSession: the file was altered, or is not a session.
            NewerFormat, OlderFormat: another version of this project wrote it.
            StorageError: the store cannot be read.
        """
        where, path = f"session {name!r} in {self.url!r}", self._files.path(name)
        if not self.exists(name):
            raise SessionNotFound(f"no {where}; there are: {', '.join(self.names()) or 'none'}")
        data = self._folder.read(path)
        try:
            return unpacked(data, torch.device(device or "cpu"))
        except (NewerFormat, OlderFormat) as error:
            raise type(error)(f"{where} has {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSession(
                f"{where} cannot be read: {error}; restore {path} from a copy, or delete it"
            ) from error

    def with_originals(
        self, saved: SavedSession, original_store: OriginalStore, place: Place | Literal["drop"]
    ) -> SavedSession:
        """A loaded session with its originals; those that cannot be read are listed in `lost`.

        Args:
            original_store: makes the originals.
            place: where they go; "drop": only those of mounted texts are loaded.

        Raises:
            StorageError: the store cannot be read.
        """
        like = [
            (layer.buffer.key[0], layer.buffer.value[0])
            for layer in saved.state.layers
            if isinstance(layer, TailState) and layer.buffer is not None
        ]
        texts = tuple((start, self.texts.with_originals(text, original_store)) for start, text in saved.texts)
        if place == "drop":
            return replace(saved, texts=texts)
        found, lost = self._originals.load_all(saved.left_out, like, original_store, place)
        return replace(saved, originals=found, left_out=(), lost=(*saved.lost, *lost), texts=texts)

    def exists(self, name: str) -> bool:
        """Whether a session of that name is saved; raises StorageError where that cannot be known."""
        return self._folder.exists(self._files.path(name))

    def names(self) -> list[str]:
        """The names of all saved sessions, in order."""
        return self._files.names()

    def delete(self, name: str) -> None:
        """Delete the session of that name if there is one, even if it cannot be read."""
        self._folder.delete(self._files.path(name))
        self._originals.unmark(mark_of(name), self._originals.held())
        self._sweep()

    def _sweep(self) -> None:
        """Delete the temporary files of killed processes: they hold text of conversations."""
        with self._folder.reaching("clean"):
            for folder in (self._files.root, self._originals.path, self.texts.path):
                for _, path in self._files.files(folder):
                    if files.is_temporary(path):
                        files.delete_abandoned(self._folder.files, path)
        self._is_swept = True
