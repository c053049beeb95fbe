"""Sessions on disk, or wherever fsspec reaches: one safetensors file each, written whole or not at all.

Owns the file's layout, its checksum, and how a session's name becomes a file's. Knows no model. A file holds:

    metadata                 format, needs (the first version of this project that reads it), sha256
    session                  what is no tensor, as JSON in bytes: safetensors bounds its own header to 100 MB
    tokens                   int64
    layers.3.key, .value     the exact tail without its spare room, or the sliding window
    layers.3.slots.key, ...  the fields of `Slots`, where there are any; where they are in int8 those of `Quantised`
                             in place of a key or value: layers.3.slots.key.codes, ...

The exact entries of compacted spans, where they are kept, lie beside in `originals/`: a file for each span, named by
its digest and shared by all sessions that have it, with an empty file for each of these sessions. What has no such mark
any more is deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Annotated, Any, Literal
from urllib.parse import unquote_to_bytes
from weakref import WeakValueDictionary

import fsspec  # type: ignore[import-untyped]
import safetensors.torch
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from am_memory import files
from am_memory.cache import CacheState, Snapshot
from am_memory.engines.base import Message
from am_memory.errors import CorruptSession, NewerFormat, OriginalLost, SessionNotFound, StorageError
from am_memory.layers import LayerState, SlidingState, TailBuffer, TailState
from am_memory.originals import LayerEntries, Original, Place, received
from am_memory.quantised import NOT_CODED, Quantised, Rows
from am_memory.schedule import ScheduledCompaction
from am_memory.slots import Segment, Slots

FORMAT, NEEDS = 1, "0.1.0"
"""How a file is written, and the first version of this project that reads it; the metadata never changes."""
SUFFIX = ".safetensors"
MAX_PART_CHARS = 200
"""Of a file's name, where file systems take 255: a longer one is cut into folders."""
SLOT_FIELDS = ("key", "value", "bias", "positions", "ranks")
QUANTISED_FIELDS = ("codes", "scale", "exact", "group")
ORIGINALS, DIGEST_CHARS = "originals", 64
CHECKSUM_KEY, ZEROS = b'"sha256":"', b"0" * 64
"""The checksum is of the whole file with zeros in its own place."""


class SavedOriginal(BaseModel, frozen=True, from_attributes=True):
    """Which exact entries a session has: those of the tokens [start, end), in a file of this digest."""

    start: Annotated[int, Field(ge=0)]
    end: int
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SavedSession:
    """All that a session is.

    Attributes:
        fingerprint: of the model that the cache belongs to.
        policy: as JSON.
        tokens: every token; the cache holds the first ones.
        schedule: the compactions made so far.
        messages: of the chat, as chat templates take them.
        message_starts: for each message, how many tokens stood before it.
        is_answering: the last message was being generated.
        tools: that the chat template tells the model of.
        metadata: what the application keeps with the session.
        num_pinned: tokens at the start that stay exact.
        state: the cache, with nothing recalled.
        originals: the exact entries of compacted tokens, where they are kept.
        recalled: where the segments begin that were exact for the time being.
        left_out: originals that are saved and were not loaded.
        lost: originals that could not be, and why.
    """

    fingerprint: str
    policy: dict[str, object]
    tokens: tuple[int, ...]
    schedule: tuple[ScheduledCompaction, ...]
    messages: tuple[Message, ...]
    message_starts: tuple[int, ...]
    is_answering: bool
    num_pinned: int
    state: Snapshot
    tools: tuple[Message, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    originals: tuple[Original, ...] = ()
    recalled: tuple[int, ...] = ()
    left_out: tuple[SavedOriginal, ...] = field(default=(), compare=False)
    lost: tuple[tuple[SavedOriginal, str], ...] = field(default=(), compare=False)


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

    def save(self, name: str, saved: SavedSession) -> None:
        """Put this session in place of the saved one, which stays if anything fails.

        Raises:
            OriginalLost: some of the originals are not what they were; without these it can be saved.
            StorageError: the store cannot be written to, or a message holds what JSON cannot.
        """
        data = _packed(saved)
        if not self._is_swept:
            self._sweep()
        held, mark = self._held_originals(), _mark(name)
        for original in saved.originals:
            entries = None if (original.digest, "") in held else original.packed()
            if (original.digest, mark) not in held:
                self._write(self._original(original.digest, mark), b"")
            if entries is not None:
                self._write(self._original(original.digest), entries)
        self._write(self._path(name), data)
        self._drop_originals(held, mark, {original.digest for original in saved.originals})

    def _write(self, path: str, data: bytes) -> None:
        """Whole, or not at all."""
        with self._reaching("write to"):
            files.write(self._files, path, data)

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
            NewerFormat: a newer version of this project wrote it.
            StorageError: the store cannot be read.
        """
        target = torch.device(device or "cpu")
        where = f"session {name!r} in {self.url!r}"
        if not self.exists(name):
            raise SessionNotFound(f"no {where}; there are: {', '.join(self.names()) or 'none'}")
        with self._reaching("read"):
            data: bytes = self._files.cat_file(self._path(name))
        try:
            header = _verified_metadata(data)
            if int(header["format"]) > FORMAT:
                raise NewerFormat(
                    f"{where} has format {header['format']}, and this version reads up to {FORMAT}: "
                    f"upgrade attention-matching-memory to {header['needs']} or newer"
                )
            saved = _unpacked(safetensors.torch.load(data), target)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
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


class _Layer(BaseModel, from_attributes=True):
    num_tokens: int | None = None  # that a sliding window has seen; None for full attention


class _Cache(BaseModel, from_attributes=True):
    layers: tuple[_Layer, ...]
    segments: tuple[Segment, ...]
    num_pinned: int


class _Content(BaseModel, from_attributes=True):
    """The part of a `SavedSession` that is no tensor."""

    fingerprint: str
    policy: dict[str, Any]
    schedule: tuple[ScheduledCompaction, ...]
    messages: tuple[dict[str, Any], ...]
    message_starts: tuple[int, ...]
    is_answering: bool
    num_pinned: int
    state: _Cache
    tools: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, Any] = {}
    originals: tuple[SavedOriginal, ...] = ()
    recalled: tuple[int, ...] = ()


def _packed(saved: SavedSession) -> bytes:
    """The whole file."""
    try:
        text = json.dumps(_Content.model_validate(saved).model_dump())
    except (TypeError, ValueError) as error:
        raise StorageError(f"a message cannot be saved: {error}; keep to what JSON can hold") from error
    tensors = {
        "session": torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8),
        "tokens": torch.tensor(saved.tokens, dtype=torch.int64),
    }
    for index, layer in enumerate(saved.state.layers):
        for part, tensor in _parts(layer).items():
            if tensor is not None:
                tensors[f"layers.{index}.{part}"] = tensor.cpu().contiguous()
    data = safetensors.torch.save(tensors, {"format": str(FORMAT), "needs": NEEDS, "sha256": ZEROS.decode()})
    return data.replace(ZEROS, sha256(data).hexdigest().encode(), 1)


def _parts(layer: LayerState) -> dict[str, Tensor | None]:
    if isinstance(layer, SlidingState):
        return {"key": layer.keys, "value": layer.values}
    parts: dict[str, Tensor | None] = {}
    if layer.buffer is not None:
        parts["key"] = layer.buffer.key[:, :, : layer.length]
        parts["value"] = layer.buffer.value[:, :, : layer.length]
    if layer.slots is not None:
        for name, field in zip(SLOT_FIELDS, layer.slots.fields, strict=True):
            if isinstance(field, Quantised):
                parts.update({f"slots.{name}.{of}": getattr(field, of) for of in QUANTISED_FIELDS})
            else:
                parts[f"slots.{name}"] = field
        parts["slots.cu_slots"] = torch.tensor(layer.slots.cu_slots)
    return parts


def _verified_metadata(data: bytes) -> dict[str, str]:
    start = data.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    end = start + len(ZEROS)
    digest = sha256(data[:start] + ZEROS)
    digest.update(memoryview(data)[end:])
    is_whole = data[start:end] == digest.hexdigest().encode()
    _require(is_whole, "its checksum does not match, so it was cut off or altered")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])


def _unpacked(tensors: dict[str, Tensor], device: torch.device) -> SavedSession:
    """A session without its originals.

    Raises KeyError or ValueError for what cannot be a session.
    """
    content = _Content.model_validate(json.loads(bytes(tensors["session"].numpy())))
    tokens = tuple(tensors["tokens"].tolist())
    _require(len(content.messages) == len(content.message_starts), "not every message has a start")
    segments, layers, ends = content.state.segments, [], set()
    for index, layer in enumerate(content.state.layers):
        prefix = f"layers.{index}."
        names = [name for name in tensors if name.startswith(prefix)]
        parts = {name.removeprefix(prefix): tensors[name] for name in names}
        state = _layer(layer, parts, segments[-1].end if segments else 0, device)
        layers.append(state)
        ends.add(state.num_tokens if isinstance(state, SlidingState) else state.start + state.length)
    is_consistent = len(ends) == 1 and max(ends) <= len(tokens)
    _require(is_consistent, f"layers of {ends} tokens in a session of {len(tokens)}")
    cache = CacheState(tuple(layers), segments, content.state.num_pinned)
    held = {**dict(content), "tokens": tokens, "state": cache, "originals": (), "left_out": content.originals}
    return SavedSession(**held)


def _layer(layer: _Layer, parts: dict[str, Tensor], tail_start: int, device: torch.device) -> LayerState:
    if not parts:
        return TailState(None, None, 0, 0) if layer.num_tokens is None else SlidingState(None, None, 0)
    key, value = parts["key"].to(device), parts["value"].to(device)
    _require(key.ndim == 4 and key.shape[:3] == value.shape[:3], f"keys {key.shape}, values {value.shape}")
    if layer.num_tokens is not None:
        return SlidingState(key, value, layer.num_tokens)
    slots = None
    if "slots.cu_slots" in parts:
        fields: dict[str, Any] = {name: _slot_field(parts, f"slots.{name}") for name in SLOT_FIELDS}
        cu_slots = parts["slots.cu_slots"].tolist()
        sizes = {len(field) for field in fields.values()}
        is_ascending = cu_slots == sorted(cu_slots) and len(cu_slots) == key.shape[1] + 1
        _require(is_ascending and sizes == {cu_slots[-1]}, f"slots {cu_slots} in tensors of {sizes}")
        slots = Slots(**fields, cu_slots=tuple(cu_slots)).to(device)
    return TailState(slots, TailBuffer(key, value), tail_start, key.shape[2])


def _slot_field(parts: dict[str, Tensor], name: str) -> Rows:
    if name in parts:
        return parts[name]
    rows = Quantised(*(parts[f"{name}.{of}"] for of in QUANTISED_FIELDS))
    coded = rows.group[rows.group != NOT_CODED]
    sizes = [len(tensor) for tensor in rows.tensors]
    is_whole = sizes == [len(coded), len(set(coded.tolist())), len(rows) - len(coded)]
    _require(is_whole, f"{len(coded)} of {len(rows)} rows coded in tensors of {sizes}")
    return rows


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)
