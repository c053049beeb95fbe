"""A compact text: read once, compacted once, and mounted in any session. Owns the file of one.

metadata                 format, needs, sha256, as in the file of a session
text                     everything that is not a tensor, as JSON in bytes
tokens                   int64
layers.3.slots.key, ...  the fields of `Slots` of one compactable layer
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel, NonNegativeFloat, NonNegativeInt

from am_memory.kv_cache.slots import Segment, Slots
from am_memory.recall.originals import Original
from am_memory.storage import files
from am_memory.storage.saved_originals import SavedOriginal
from am_memory.storage.session_layers import packed_slots, parts_of_layers, require, require_segments, unpacked_slots
from am_memory.storage.tensor_file import pack_file, unpack_file, version_of


class CompactText(BaseModel, frozen=True):
    """A text in few slots, under a name.

    Attributes:
        name: its name in the memory and in the store.
        num_tokens: tokens of the text.
        num_slots: compact slots, mean over KV heads: what it takes where it is mounted.
        num_bytes: memory of its slots.
        preview: how it begins.
    """

    name: str
    num_tokens: NonNegativeInt
    num_slots: NonNegativeFloat
    num_bytes: NonNegativeInt
    preview: str

    def __str__(self) -> str:
        return f"{self.name!r}: {self.num_tokens:,} tokens in {self.num_slots:,.0f} slots"


@dataclass(frozen=True, eq=False)
class TextCache:
    """What a session needs of a compact text to mount it. Positions are those at which the text was read.

    Attributes:
        about: for people.
        uid: no other text has it, and no other compaction of this one.
        fingerprint, tokenizer_fingerprint: of the model that read it.
        tokens: the opening that it was read behind, then the tokens of the text.
        start: where the text begins, behind the opening.
        segments: the compacted parts of the text.
        slots: of each compactable layer, in host memory; none of the opening.
        originals: the exact entries of the segments, where the policy kept them.
        left_out: saved originals that were not loaded.
        version: the checksum of its saved file; "" if it was not saved.
    """

    about: CompactText
    uid: str
    fingerprint: str
    tokenizer_fingerprint: str
    tokens: tuple[int, ...]
    start: int
    segments: tuple[Segment, ...]
    slots: tuple[Slots, ...]
    originals: tuple[Original, ...] = ()
    left_out: tuple[SavedOriginal, ...] = ()
    version: str = ""

    @property
    def end(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def mean_slots(self) -> float:
        """Slots, mean over KV heads."""
        return sum(slots.num_slots for slots in self.slots) / max(sum(slots.num_heads for slots in self.slots), 1)

    def without_lost(self) -> TextCache:
        """The same text without the originals that turned out to be lost."""
        kept = tuple(original for original in self.originals if original.lost is None)
        return self if len(kept) == len(self.originals) else replace(self, originals=kept)


class TextFields(BaseModel, from_attributes=True):
    """The fields of a `TextCache` that are not tensors, as they are written."""

    about: CompactText
    uid: str
    fingerprint: str
    tokenizer_fingerprint: str
    start: NonNegativeInt
    segments: tuple[Segment, ...]
    num_heads: tuple[NonNegativeInt, ...]  # KV heads of each layer
    originals: tuple[SavedOriginal, ...] = ()


def packed_text(text: TextCache) -> bytes:
    """A compact text as the bytes of its file."""
    fields = TextFields.model_validate(text.__dict__ | {"num_heads": [slots.num_heads for slots in text.slots]})
    tensors = {
        "text": torch.frombuffer(bytearray(json.dumps(fields.model_dump()), "ascii"), dtype=torch.uint8),
        "tokens": torch.tensor(text.tokens, dtype=torch.int64),
    }
    for index, slots in enumerate(text.slots):
        tensors |= {f"layers.{index}.{part}": tensor for part, tensor in packed_slots(slots).items()}
    return pack_file(tensors)


def unpacked_text(data: bytes) -> TextCache:
    """Read a compact text from the bytes of its file; its originals are `left_out`.

    Every size and position in the file is checked against the data, as in the file of a session.

    Raises:
        NewerFormat, OlderFormat: another version of this project wrote it.
        KeyError, TypeError, ValueError: it is not a compact text.
    """
    try:
        return _unpacked(data)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _unpacked(data: bytes) -> TextCache:
    tensors = unpack_file(data)
    content, ids = tensors.pop("text"), tensors.pop("tokens")
    require(
        content.dtype == torch.uint8 and ids.dtype == torch.int64 and ids.ndim == 1, "its tokens have another dtype"
    )
    fields = TextFields.model_validate(json.loads(bytes(content.numpy())))
    tokens = tuple(ids.tolist())
    require(fields.start < len(tokens), f"a text from token {fields.start} of {len(tokens)}")
    require_segments(fields.segments, len(tokens))
    parts = parts_of_layers(tensors, len(fields.num_heads))
    layers = zip(parts, fields.num_heads, strict=True)
    slots = tuple(unpacked_slots(of_layer, num_heads, len(tokens)) for of_layer, num_heads in layers)
    firsts = [*(int(each.positions.min()) for each in slots if each.num_slots), *(one.start for one in fields.segments)]
    require(min(firsts, default=fields.start) >= fields.start, "it has slots or segments of its opening")
    return TextCache(
        fields.about,
        fields.uid,
        fields.fingerprint,
        fields.tokenizer_fingerprint,
        tokens,
        fields.start,
        fields.segments,
        slots,
        left_out=fields.originals,
        version=version_of(data[: files.HEAD_BYTES]),
    )
