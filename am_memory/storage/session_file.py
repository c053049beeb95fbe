"""The file of a saved session: one safetensors file, with a checksum of itself. Knows no store and no model.

metadata                 format, needs (the first version of this project that reads it), sha256
session                  everything that is not a tensor, as JSON in bytes: safetensors limits its header to 100 MB
tokens                   int64
search_queries           the last queries of the search heads, if they are kept
layers.3.key, .value     the exact tail without spare capacity, or the sliding window
layers.3.conv.0, .recurrent.0   the states of a layer without keys
texts.0                  the file of a compact text that is, or was, mounted, in bytes
layers.3.slots.key, ...  the fields of `Slots`, if the layer has any. Keys or values in int8 are stored as the fields
                         of `Quantised` instead: layers.3.slots.key.codes, ...
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt
from torch import Tensor

from am_memory.compaction.record import CompactionRecord, MountRecord
from am_memory.engines.base import Message
from am_memory.errors import StorageError
from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import RecurrentState, SlidingState
from am_memory.kv_cache.slots import Segment, tail_start
from am_memory.recall.originals import Original
from am_memory.recall.paging import Page
from am_memory.recall.search_heads import SearchHead
from am_memory.recall.search_queries import SearchQueries
from am_memory.storage import files
from am_memory.storage.compact_text import TextCache, packed_text, unpacked_text
from am_memory.storage.saved_originals import SavedOriginal
from am_memory.storage.session_layers import (
    MAX_STATES,
    packed_layer,
    parts_of_layers,
    require,
    require_segments,
    unpacked_layer,
    unpacked_states,
)
from am_memory.storage.tensor_file import pack_file, unpack_file, version_of


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
        search_queries: of the last tokens in the cache, kept for the next lookup.
        texts: the compact texts that were mounted at some time, each with the negative position of its first token.
        mount_records: what was done with these texts, in order.
        tokenizer_fingerprint: identifies the tokenizer of the tokens; "" if unknown.
        template_fingerprint: identifies the chat template of the messages; "" if there is none, or it is unknown.
        version: of the saved file, see `version_of`; "" for a session that was not loaded.
        model_name: the model's name, for people; "" if unknown.
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
    search_queries: SearchQueries | None = None
    texts: tuple[tuple[int, TextCache], ...] = ()
    mount_records: tuple[MountRecord, ...] = ()
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False
    model_name: str = ""
    version: str = field(default="", compare=False)
    left_out: tuple[SavedOriginal, ...] = field(default=(), compare=False)
    lost: tuple[tuple[SavedOriginal, str], ...] = field(default=(), compare=False)


class LayerFields(BaseModel, from_attributes=True):
    """The fields of a layer's state that are not tensors."""

    num_tokens: NonNegativeInt | None = None  # tokens that a sliding window has seen; None for other layers
    num_states: Annotated[int, Field(ge=0, le=MAX_STATES)] | None = None  # recurrent states; None if it has keys


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
    search_heads: tuple[SearchHead, ...] = ()
    search_start: NonNegativeInt = 0
    text_starts: tuple[int, ...] = ()
    mount_records: tuple[MountRecord, ...] = ()
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    has_own_policy: bool = False
    model_name: str = ""


def packed(saved: SavedSession) -> bytes:
    """A session as the bytes of its file.

    Raises:
        StorageError: a message, a tool or the metadata holds something that JSON cannot.
    """
    try:
        fields = SessionFields.model_validate(saved)
        apart: dict[str, object] = {"text_starts": tuple(start for start, _ in saved.texts)}
        if saved.search_queries is not None:
            apart |= {"search_heads": saved.search_queries.heads, "search_start": saved.search_queries.start}
        fields = fields.model_copy(update=apart)
        text = json.dumps(fields.model_dump())
    except (TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"a message or the metadata cannot be saved: {error}; use only values that JSON can hold"
        ) from error
    tensors = {
        "session": torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8),
        "tokens": torch.tensor(saved.tokens, dtype=torch.int64),
    }
    if saved.search_queries is not None:
        tensors["search_queries"] = saved.search_queries.queries
    for index, (_, of_text) in enumerate(saved.texts):
        tensors[f"texts.{index}"] = torch.frombuffer(bytearray(packed_text(of_text)), dtype=torch.uint8)
    for index, layer in enumerate(saved.state.layers):
        for part, tensor in packed_layer(layer).items():
            if tensor is not None:
                tensors[f"layers.{index}.{part}"] = tensor
    return pack_file(tensors)


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
    tensors = unpack_file(data)
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
    texts = _texts(content.text_starts, tensors)
    _require_mounts(content.mount_records, texts, len(tokens))
    queries = _search_queries(content, tensors, len(tokens), device)
    cache = _cache(content.state, tensors, len(tokens), device)
    fields = {name: value for name, value in content if name not in ("text_starts", "search_heads", "search_start")}
    held = {**fields, "tokens": tokens, "state": cache, "originals": (), "left_out": content.originals, "texts": texts}
    held["search_queries"] = queries
    return SavedSession(**held, version=version_of(data[: files.HEAD_BYTES]))


def _require_records(records: Sequence[CompactionRecord], num_tokens: int) -> None:
    before, last = 0, (-1, -1)
    for made in records:
        at = made.at_tokens, made.swapped_at
        require(
            (at == last if made.continues else made.at_tokens >= before)
            and made.at_tokens <= made.swapped_at <= num_tokens
            and made.lag_tokens >= 0
            and 0 <= made.live_start <= made.at_tokens
            and all(0 <= step.at_tokens <= num_tokens for step in made.steps)
            and len(made.plan.segments) > 0,
            f"a compaction at {made.at_tokens} of {num_tokens} tokens, after one at {before}",
        )
        require_segments(made.plan.segments, made.at_tokens)
        before, last = made.swapped_at, at


def _search_queries(
    content: SessionFields, tensors: dict[str, Tensor], num_tokens: int, device: torch.device
) -> SearchQueries | None:
    """Take the kept queries out of the tensors."""
    if not content.search_heads:
        return None
    queries = tensors.pop("search_queries")
    is_typed = queries.is_floating_point() and queries.ndim == 3 and len(queries) == len(content.search_heads)
    require(is_typed and bool(queries.isfinite().all()), f"kept queries {queries.dtype} {tuple(queries.shape)}")
    end = content.search_start + queries.shape[1]
    require(end <= num_tokens, f"kept queries of tokens up to {end} of {num_tokens}")
    return SearchQueries(content.search_heads, content.search_start, queries.to(device))


def _texts(starts: Sequence[int], tensors: dict[str, Tensor]) -> tuple[tuple[int, TextCache], ...]:
    """Take the mounted texts out of the tensors; the ranges of their names must not overlap."""
    texts = []
    for index, start in enumerate(starts):
        data = tensors.pop(f"texts.{index}")
        require(data.dtype == torch.uint8, "a mounted text has another dtype")
        texts.append((start, unpacked_text(bytes(data.numpy()))))
    ranges = sorted((start, start + text.num_tokens) for start, text in texts)
    ends = [*(start for start, _ in ranges[1:]), 0]
    is_apart = all(end <= following for (_, end), following in zip(ranges, ends, strict=False))
    require(is_apart, f"mounted texts named {ranges}")
    return tuple(texts)


def _require_mounts(records: Sequence[MountRecord], texts: Sequence[tuple[int, TextCache]], num_tokens: int) -> None:
    """Each step is about one of the texts, or a part of one, and follows the step before."""
    before = 0
    for record in records:
        ranges = [(start, start + text.num_tokens) for start, text in texts]
        is_known = (record.start, record.end) in ranges if record.is_of_text else _is_within(record, ranges)
        is_in_order = before <= record.at_tokens <= num_tokens and record.num_compactions >= 0
        is_in_order = is_in_order and (record.seen_from >= record.at_tokens or not record.is_of_text)
        require(is_known and is_in_order, f"a text or page {record.start} to {record.end} at {record.at_tokens} tokens")
        before = record.at_tokens


def _is_within(record: MountRecord, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(start <= record.start < record.end <= end for start, end in ranges)


def _cache(cache: CacheFields, tensors: dict[str, Tensor], num_tokens: int, device: torch.device) -> CacheState:
    parts, start = parts_of_layers(tensors, len(cache.layers)), tail_start(cache.segments)
    layers = tuple(
        unpacked_layer(of_layer, layer.num_tokens, start, device)
        if layer.num_states is None
        else unpacked_states(of_layer, layer.num_states, device)
        for of_layer, layer in zip(parts, cache.layers, strict=True)
    )
    with_keys = (state for state in layers if not isinstance(state, RecurrentState))
    ends = {state.num_tokens if isinstance(state, SlidingState) else state.start + state.length for state in with_keys}
    # The last token is left to be read with what follows it.
    is_consistent = len(ends) == 1 and start <= max(ends) <= max(num_tokens - 1, 0)
    require(is_consistent, f"layers of {ends} tokens in a session of {num_tokens}")
    return CacheState(layers, cache.segments, cache.num_pinned_slots)
