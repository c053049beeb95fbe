"""The file of a saved session: one safetensors file, with a checksum of itself. Knows no store and no model.

metadata                 format, needs (the first version of this project that reads it), sha256
session                  what is no tensor, as JSON in bytes: safetensors bounds its own header to 100 MB
tokens                   int64
layers.3.key, .value     the exact tail without its spare room, or the sliding window
layers.3.slots.key, ...  the fields of `Slots`, where there are any; where they are in int8 those of `Quantised`
                         in place of a key or value: layers.3.slots.key.codes, ...
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from am_memory import files
from am_memory.cache import CacheState, Snapshot
from am_memory.engines.base import Message
from am_memory.errors import NewerFormat, StorageError
from am_memory.layers import LayerState, SlidingState, TailBuffer, TailState
from am_memory.originals import Original
from am_memory.quantised import NOT_CODED, Quantised, Rows
from am_memory.schedule import ScheduledCompaction
from am_memory.slots import Segment, Slots

FORMAT, NEEDS = 1, "0.1.0"
"""How a file is written, and the first version of this project that reads it; the metadata never changes."""
SLOT_FIELDS = ("key", "value", "bias", "positions", "ranks")
QUANTISED_FIELDS = ("codes", "scale", "exact", "group")
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
        has_own_policy: it was given to this session, and not to the memory.
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
        tokenizer_fingerprint: of the tokenizer that the tokens are of; "" where nobody has said so.
        template_fingerprint: of the chat template that wrote the messages; "" where there was none, or nobody said so.
        version: of the saved file, see `version_of`; "" for what was not loaded.
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
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False
    version: str = field(default="", compare=False)
    left_out: tuple[SavedOriginal, ...] = field(default=(), compare=False)
    lost: tuple[tuple[SavedOriginal, str], ...] = field(default=(), compare=False)


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
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False


def packed(saved: SavedSession) -> bytes:
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


def version_of(head: bytes) -> str:
    """What tells a saved file from any other, given its first bytes: its checksum; "" for what is no such file."""
    start = head.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    version = head[start : start + len(ZEROS)]
    return version.decode() if start >= len(CHECKSUM_KEY) and re.fullmatch(rb"[0-9a-f]{64}", version) else ""


def _verified_metadata(data: bytes) -> dict[str, str]:
    start = data.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    end = start + len(ZEROS)
    digest = sha256(data[:start] + ZEROS)
    digest.update(memoryview(data)[end:])
    is_whole = data[start:end] == digest.hexdigest().encode()
    _require(is_whole, "its checksum does not match, so it was cut off or altered")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])


def unpacked(data: bytes, device: torch.device) -> SavedSession:
    """A session without its originals, which are `left_out`.

    Raises:
        NewerFormat: a newer version of this project wrote it.
        KeyError, TypeError, ValueError: it cannot be a session.
    """
    header = _verified_metadata(data)
    if int(header["format"]) > FORMAT:
        raise NewerFormat(
            f"format {header['format']}, and this version reads up to {FORMAT}: upgrade attention-matching-memory to "
            f"{header['needs']} or newer"
        )
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
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
    return SavedSession(**held, version=version_of(data[: files.HEAD_BYTES]))


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
