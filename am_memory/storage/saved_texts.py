"""Compact texts in a store: one file each, in a folder of their own, with the originals marked as a session's are."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from am_memory.errors import CorruptSession, NewerFormat, OlderFormat, TextNotFound
from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.slots import Slots
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import KeysAndValues
from am_memory.storage import files
from am_memory.storage.compact_text import CompactText, TextCache, TextFields, packed_text, unpacked_text
from am_memory.storage.file_names import NamedFiles
from am_memory.storage.folder import Folder
from am_memory.storage.saved_originals import SavedOriginals, mark_of
from am_memory.storage.session_layers import require
from am_memory.storage.tensor_file import version_of

FOLDER = "texts"


class SavedTexts:
    """The compact texts in a store's folder."""

    def __init__(self, folder: Folder, originals: SavedOriginals) -> None:
        self._folder, self._originals = folder, originals
        self.path = folder.path(FOLDER)
        self._files = NamedFiles(folder, self.path)

    def save(self, text: TextCache) -> TextCache:
        """Save a text in place of the one of that name, which stays if anything fails; returns it with its version.

        Raises:
            StorageError: the store cannot be written to.
        """
        name = text.about.name
        mark, held = mark_of(name, is_text=True), self._originals.held()
        self._originals.write(text.originals, mark, held)
        data = packed_text(text)
        self._folder.write(self._files.path(name), data)
        self._originals.unmark(mark, held, {original.digest for original in text.originals})
        return replace(text, version=version_of(data[: files.HEAD_BYTES]))

    def version(self, name: str) -> str:
        """The checksum of the text of that name; "" if there is none."""
        head = self._folder.head(self._files.path(name))
        return "" if head is None else version_of(head)

    def load(self, name: str, original_store: OriginalStore) -> TextCache:
        """The text of that name.

        Raises:
            TextNotFound: there is none.
            CorruptSession: the file was altered, or is not a compact text.
            NewerFormat, OlderFormat: another version of this project wrote it.
            StorageError: the store cannot be read.
        """
        where, path = f"compact text {name!r} in {self._folder.url!r}", self._files.path(name)
        if not self._folder.exists(path):
            raise TextNotFound(name, self.names())
        try:
            text = unpacked_text(self._folder.read(path))
        except (NewerFormat, OlderFormat) as error:
            raise type(error)(f"{where} has {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptSession(f"{where} cannot be read: {error}; compact the text again, or delete it") from error
        return self.with_originals(replace(text, about=_named(text.about, name)), original_store)

    def with_originals(self, text: TextCache, original_store: OriginalStore) -> TextCache:
        """A loaded text with its originals, without those that cannot be read: their tokens have no pages."""
        like = [_like(slots) for slots in text.slots]
        found, _ = self._originals.load_all(text.left_out, like, original_store, "host")
        return replace(text, originals=found, left_out=())

    def names(self) -> list[str]:
        """The names of all texts, in order; their files may be damaged."""
        return self._files.names()

    def all(self) -> list[CompactText]:
        """All texts whose files can be read, in the order of their names. Only a small part of each file is read."""
        found = []
        for name in self.names():
            damaged = KeyError, TypeError, ValueError, RecursionError
            with self._folder.reaching("read"), suppress(FileNotFoundError, *damaged):  # deleted meanwhile, or damaged
                found.append(_named(self._about(self._files.path(name)), name))
        return found

    def _about(self, path: str) -> CompactText:
        files = self._folder.files
        num_bytes, begin = files.size(path), 8
        end = begin + int.from_bytes(files.cat_file(path, start=0, end=begin), "little")
        require(end <= num_bytes, "its header is longer than the file")
        first, last = json.loads(files.cat_file(path, start=begin, end=end))["text"]["data_offsets"]
        require(0 <= first <= last <= num_bytes - end, "its text lies outside the file")
        return TextFields.model_validate(json.loads(files.cat_file(path, start=end + first, end=end + last))).about

    def delete(self, name: str) -> None:
        """Delete the text of that name if there is one, even if it cannot be read."""
        self._folder.delete(self._files.path(name))
        self._originals.unmark(mark_of(name, is_text=True), self._originals.held())


def _named(text: CompactText, name: str) -> CompactText:
    """The text under the name of its file: a copied or forged file may hold another one."""
    return text.model_copy(update={"name": name})


def _like(slots: Slots) -> KeysAndValues:
    """Keys and values of no token in the layer of these slots."""
    key, value = (rows.exact if isinstance(rows, Quantised) else rows for rows in (slots.key, slots.value))
    return key.new_empty(slots.num_heads, 0, key.shape[1]), value.new_empty(slots.num_heads, 0, value.shape[1])
