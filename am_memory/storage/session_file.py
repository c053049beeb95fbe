"""The file of a saved session: one safetensors file, with a checksum of itself. Knows no store and no model.

metadata                 format, needs (the first version of this project that reads it), sha256
session                  everything that is not a tensor, as JSON in bytes: safetensors limits its header to 100 MB
tokens                   int64
layers.3.key, .value     the exact tail without spare capacity, or the sliding window
layers.3.slots.key, ...  the fields of `Slots`, if the layer has any. Keys or values in int8 are stored as the fields
                         of `Quantised` instead: layers.3.slots.key.codes, ...
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, Field, NonNegativeInt
from torch import Tensor

from am_memory.compaction.record import CompactionRecord
from am_memory.engines.base import Message
from am_memory.errors import NewerFormat, OlderFormat, StorageError
from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import SlidingState
from am_memory.kv_cache.slots import Segment, tail_start
from am_memory.recall.originals import Original
from am_memory.recall.paging import Page
from am_memory.storage import files
from am_memory.storage.session_layers import packed_layer, require, require_segments, unpacked_layer

FORMAT, NEEDS = 3, "0.1.0"
"""The format of a file, and the first version of this project that reads it. The metadata keep their form forever."""
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
MAX_AXES, MAX_EMPTY_SIZE = 4, 2**24
CHECKSUM_KEY, ZEROS = b'"sha256":"', b"0" * 64
"""The checksum is computed over the whole file, with zeros in the place of the checksum itself."""


class SavedOriginal(BaseModel, frozen=True, from_attributes=True):
    """Names the exact entries of the tokens [start, end) by the digest of their file."""

    start: NonNegativeInt
    end: int
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class SavedSession:
    """Everything that a session is.

    Attributes:
        fingerprint: identifies the model that the cache belongs to.
        policy: as JSON.
        has_own_policy: the policy was given to this session, and not to the memory.
        tokens: every token; the cache holds the first ones.
        records: the compactions made so far, in order.
        messages: the chat messages, as chat templates take them.
        message_starts: for each message, the number of tokens before it.
        is_answering: the last message was being generated.
        tools: functions that the chat template describes to the model.
        metadata: what the application keeps with the session.
        num_pinned: tokens at the start that stay exact.
        state: the cache, with nothing recalled.
        originals: the exact entries of compacted tokens, where the policy keeps them.
        recalled: the pages that were exact for the time being.
        tokenizer_fingerprint: identifies the tokenizer of the tokens; "" if unknown.
        template_fingerprint: identifies the chat template of the messages; "" if there is none, or it is unknown.
        version: of the saved file, see `version_of`; "" for a session that was not loaded.
        left_out: saved originals that were not loaded.
        lost: saved originals that could not be loaded, with the reason.
    """

    fingerprint: str
    policy: dict[str, object]
    tokens: tuple[int, ...]
    records: tuple[CompactionRecord, ...]
    messages: tuple[Message, ...]
    message_starts: tuple[int, ...]
    is_answering: bool
    num_pinned: int
    state: Snapshot
    tools: tuple[Message, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    originals: tuple[Original, ...] = ()
    recalled: tuple[Page, ...] = ()
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False
    version: str = field(default="", compare=False)
    left_out: tuple[SavedOriginal, ...] = field(default=(), compare=False)
    lost: tuple[tuple[SavedOriginal, str], ...] = field(default=(), compare=False)


class LayerFields(BaseModel, from_attributes=True):
    """The fields of a layer's state that are not tensors."""

    num_tokens: NonNegativeInt | None = None  # tokens that a sliding window has seen; None for full attention


class CacheFields(BaseModel, from_attributes=True):
    """The fields of a cache's state that are not tensors."""

    layers: tuple[LayerFields, ...]
    segments: tuple[Segment, ...]
    num_pinned_slots: NonNegativeInt


class SessionFields(BaseModel, from_attributes=True):
    """The fields of a `SavedSession` that are not tensors, as they are written."""

    fingerprint: str
    policy: dict[str, Any]
    records: tuple[CompactionRecord, ...]
    messages: tuple[dict[str, Any], ...]
    message_starts: tuple[int, ...]
    is_answering: bool
    num_pinned: NonNegativeInt
    state: CacheFields
    tools: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, Any] = {}
    originals: tuple[SavedOriginal, ...] = ()
    recalled: tuple[Page, ...] = ()
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False


def packed(saved: SavedSession) -> bytes:
    """A session as the bytes of its file.

    Raises:
        StorageError: a message, a tool or the metadata holds something that JSON cannot.
    """
    try:
        text = json.dumps(SessionFields.model_validate(saved).model_dump())
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"a message or the metadata cannot be saved: {error}; use only values that JSON can hold"
        ) from error
    tensors = {
        "session": torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8),
        "tokens": torch.tensor(saved.tokens, dtype=torch.int64),
    }
    for index, layer in enumerate(saved.state.layers):
        for part, tensor in packed_layer(layer).items():
            if tensor is not None:
                tensors[f"layers.{index}.{part}"] = tensor.cpu().contiguous()
    data = safetensors.torch.save(tensors, {"format": str(FORMAT), "needs": NEEDS, "sha256": ZEROS.decode()})
    return data.replace(ZEROS, sha256(data).hexdigest().encode(), 1)


def version_of(head: bytes) -> str:
    """The checksum in the first bytes of a saved file, which identifies its version; "" if it is no such file."""
    start = head.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    version = head[start : start + len(ZEROS)]
    return version.decode() if start >= len(CHECKSUM_KEY) and re.fullmatch(rb"[0-9a-f]{64}", version) else ""


def unpacked(data: bytes, device: torch.device) -> SavedSession:
    """Read a session from the bytes of its file; its originals are `left_out`.

    Every size and position in the file is checked against the data. A forged file cannot make anything larger than
    itself, or point outside of itself.

    Raises:
        NewerFormat, OlderFormat: another version of this project wrote it.
        KeyError, TypeError, ValueError: it is not a session.
    """
    try:
        return _unpacked(data, device)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _unpacked(data: bytes, device: torch.device) -> SavedSession:
    header = _verified_header(data)
    metadata = header.pop("__metadata__")
    if int(metadata["format"]) > FORMAT:
        raise NewerFormat(
            f"format {metadata['format']}, and this version reads up to {FORMAT}: upgrade attention-matching-memory to "
            f"{metadata['needs']} or newer"
        )
    if int(metadata["format"]) < FORMAT:
        raise OlderFormat(
            f"format {metadata['format']}, and this version reads format {FORMAT} only: open it with the version that "
            "saved it, or delete it and give the conversation to a new session"
        )
    for name, entry in header.items():
        _require_room(name, entry)
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    text, ids = tensors.pop("session"), tensors.pop("tokens")
    require(
        text.dtype == torch.uint8 and ids.dtype == torch.int64 and ids.ndim == 1,
        "its tokens or its JSON have another dtype",
    )
    content = SessionFields.model_validate(json.loads(bytes(text.numpy())))
    tokens = tuple(ids.tolist())
    require_segments(content.state.segments, len(tokens))
    _require_records(content.records, len(tokens))
    starts = [0, *content.message_starts, len(tokens)]
    is_in_order = len(content.messages) == len(starts) - 2 and starts == sorted(starts)
    require(is_in_order, "the starts of its messages are missing, or not in order")
    require(all(isinstance(message.get("role"), str) for message in content.messages), "a message has no role")
    cache = _cache(content.state, tensors, len(tokens), device)
    held = {**dict(content), "tokens": tokens, "state": cache, "originals": (), "left_out": content.originals}
    return SavedSession(**held, version=version_of(data[: files.HEAD_BYTES]))


def _verified_header(data: bytes) -> dict[str, Any]:
    start = data.find(CHECKSUM_KEY) + len(CHECKSUM_KEY)
    end = start + len(ZEROS)
    digest = sha256(data[:start] + ZEROS)
    digest.update(memoryview(data)[end:])
    is_whole = data[start:end] == digest.hexdigest().encode()
    require(is_whole, "its checksum does not match: it was cut off or altered")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    require(
        isinstance(header, dict) and isinstance(header["__metadata__"], dict), "its header is not a safetensors header"
    )
    return dict(header)


def _require_room(name: str, entry: Any) -> None:
    """Raise ValueError unless a tensor takes exactly the bytes that its shape and dtype need."""
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    is_shape = len(shape) <= MAX_AXES and all(type(size) is int and size >= 0 for size in shape)
    require(
        is_shape and math.prod(shape) * ITEM_BYTES[entry["dtype"]] == end - begin,
        f"the bytes of {name} do not fit its shape",
    )
    require(0 not in shape or max(shape) <= MAX_EMPTY_SIZE, f"{name} is empty, but its shape is too large")


def _require_records(records: Sequence[CompactionRecord], num_tokens: int) -> None:
    before = 0
    for made in records:
        require(
            before <= made.at_tokens <= made.swapped_at <= num_tokens
            and made.lag_tokens >= 0
            and 0 <= made.live_start <= made.at_tokens
            and all(0 <= step.at_tokens <= num_tokens for step in made.steps)
            and len(made.plan.segments) > 0,
            f"a compaction at {made.at_tokens} of {num_tokens} tokens, after one at {before}",
        )
        require_segments(made.plan.segments, made.at_tokens)
        before = made.swapped_at


def _cache(cache: CacheFields, tensors: dict[str, Tensor], num_tokens: int, device: torch.device) -> CacheState:
    parts: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(cache.layers))}
    for name, tensor in tensors.items():
        _, index, part = name.split(".", 2)
        parts[int(index)][part] = tensor
    start = tail_start(cache.segments)
    layers = tuple(
        unpacked_layer(parts[index], layer.num_tokens, start, device) for index, layer in enumerate(cache.layers)
    )
    ends = {state.num_tokens if isinstance(state, SlidingState) else state.start + state.length for state in layers}
    # The last token is left to be read with what follows it.
    is_consistent = len(ends) == 1 and start <= max(ends) <= max(num_tokens - 1, 0)
    require(is_consistent, f"layers of {ends} tokens in a session of {num_tokens}")
    return CacheState(layers, cache.segments, cache.num_pinned_slots)
