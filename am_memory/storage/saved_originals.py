"""The exact entries of compacted spans in a store: one file for each span, shared by all sessions that have it.

A span's file is named by the digest of its bytes. Each session that needs it adds a mark, an empty file beside it. A
file without any mark is deleted. Knows no session but its mark.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Literal
from weakref import WeakValueDictionary

from pydantic import BaseModel, Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from am_memory.errors import OriginalLost, StorageError
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.originals import KeysAndValues, Kinds, Original, Place, keys_of, kinds_of, unpacked
from am_memory.storage.folder import Folder

FOLDER, SUFFIX, DIGEST_CHARS = "originals", ".safetensors", 64

Held = Collection[tuple[str, str]]
"""(digest, mark) of the files that are there; the mark is empty for the entries themselves."""


class SavedOriginal(BaseModel, frozen=True, from_attributes=True):
    """Names the exact entries of the tokens [start, end) by the digest of their file."""

    start: NonNegativeInt
    end: int
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def mark_of(name: str, *, is_text: bool = False) -> str:
    """The mark of a session, or of a compact text, which follows the digest of everything that it needs."""
    end = b"\xff" if is_text else b""  # no encoded name holds this byte
    return f".{sha256(name.encode('utf-8', 'surrogatepass') + end).hexdigest()[:24]}"


@dataclass(frozen=True, eq=False)
class SavedEntries:
    """`Entries` in a store. Every read but that of `keys` compares their digest.

    Attributes:
        num_tokens: whose entries they are.
        kinds: what the entries of the model's layers have in common, to check those that another process wrote. None:
            this process wrote them, or had the same.
    """

    folder: Folder
    path: str
    digest: str
    num_tokens: int
    kinds: Kinds | None = None
    place: Literal["store"] = "store"
    nbytes: int = 0

    def layers(self) -> list[KeysAndValues]:
        entries = unpacked(self.packed())
        if (self.kinds is not None and kinds_of(entries) != self.kinds) or any(
            tensor.shape[1] != self.num_tokens for layer in entries for tensor in layer
        ):
            raise OriginalLost(f"{self.path} does not hold the entries of {self.num_tokens} tokens in these layers")
        return entries

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
        """From a local folder these keys alone are read: a resumed session would else read all that was compacted."""
        if not self.folder.is_local or self.kinds is None:
            return keys_of(self.layers(), heads)
        try:
            with safe_open(self.path, framework="pt") as file:
                keys = [file.get_slice(f"{layer}.key")[head] for layer, head in heads]
        except (OSError, SafetensorError, IndexError) as error:
            raise OriginalLost(f"{self.path} cannot be read: {error}") from error
        for (layer, _), key in zip(heads, keys, strict=True):
            dtype, _, _, head_dim = self.kinds[2 * layer]
            is_right = (key.dtype, *key.shape) == (dtype, self.num_tokens, head_dim)
            if not is_right or not bool(key.isfinite().all()):
                raise OriginalLost(f"{self.path} does not hold the keys of {self.num_tokens} tokens in layer {layer}")
        return keys

    @property
    def is_there(self) -> bool:
        with suppress(StorageError):
            return self.folder.head(self.path) is not None
        return False

    def require(self) -> None:
        """Raise OriginalLost if there is no such file."""
        if self.folder.head(self.path) is None:
            raise OriginalLost(f"{self.path} is missing")

    def packed(self) -> bytes:
        self.require()
        data = self.folder.read(self.path)
        if sha256(data).hexdigest() != self.digest:
            raise OriginalLost(f"{self.path} was altered: restore it from a copy before the session is saved")
        return data


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

        In a local folder they need no other copy from then on, see `Original.backup`.

        Raises:
            OriginalLost: some of them are not what was kept.
        """
        for original in originals:
            entries = None if (original.digest, "") in held else original.packed()
            if (original.digest, mark) not in held:  # first, so that nobody deletes the entries as unmarked
                self._folder.write(self._path(original.digest, mark), b"")
            if entries is not None:
                self._folder.write(self._path(original.digest), entries)
            if self._folder.is_local:
                original.backup = self._entries(SavedOriginal.model_validate(original))

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

    def load_all(
        self, saved: Iterable[SavedOriginal], like: Sequence[KeysAndValues], original_store: OriginalStore, place: Place
    ) -> tuple[tuple[Original, ...], list[tuple[SavedOriginal, str]]]:
        """The originals that can be read; and the others, each with the reason. See `load`."""
        found, lost = list[Original](), list[tuple[SavedOriginal, str]]()
        for original in saved:
            try:
                found.append(self.load(original, like, original_store, place))
            except OriginalLost as error:
                lost.append((original, str(error)))
        return tuple(found), lost

    def load(
        self, saved: SavedOriginal, like: Sequence[KeysAndValues], original_store: OriginalStore, place: Place
    ) -> Original:
        """The original of one span; those that `original_store` has loaded before are shared.

        In a local folder the entries stay where they are, and are read and checked when they are used. From other
        stores they are read now: nobody who uses a session waits for a network.

        Args:
            like: entries of the same layers, to check shapes and dtypes with.
            original_store, place: where entries are kept that are read now.

        Raises:
            OriginalLost: the file is missing, or was altered as far as it is read now.
            StorageError: the store cannot be read.
        """
        known = self._loaded.get((saved, original_store))
        if known is not None and known.lost is None:
            return known
        entries = self._entries(saved, kinds_of(like))
        if self._folder.is_local:
            entries.require()
            original = Original(saved.start, saved.end, entries)
        else:
            original = original_store.add(saved.start, saved.end, entries.layers(), place)
        self._loaded[saved, original_store] = original
        return original

    def _entries(self, saved: SavedOriginal, kinds: Kinds | None = None) -> SavedEntries:
        return SavedEntries(self._folder, self._path(saved.digest), saved.digest, saved.end - saved.start, kinds)

    def _path(self, digest: str, mark: str = "") -> str:
        return f"{self.path}/{digest}{mark}{SUFFIX}"
