"""The memory of one conversation for clients: sizes, segments, compactions, slots and bytes by layer and head."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel

from am_memory.compaction.record import CompactionRecord
from am_memory.errors import InvalidInput
from am_memory.events import Span
from am_memory.kv_cache.layers import LayerState, RecurrentState, TailState
from am_memory.session.mounts import Mount
from am_memory.session.saving import snapshot
from am_memory.session.session import Session
from am_memory.session.stats import Stats
from am_memory.storage.session_file import SavedSession
from am_memory_server.service import compaction_reports

PREVIEW_TOKENS = 40
"""Tokens at each end of a segment that a view shows as text."""
MAX_TEXT_TOKENS = 4096
"""Tokens that one request for a text gets at most."""


class SegmentView(BaseModel):
    """How the tokens [start, end) of the conversation are held.

    Attributes:
        slots: mean over the heads.
        num_cuts: how often a compacted segment was shrunk later.
        is_refined: a compacted segment was fitted again later.
        text: how it begins and how it ends.
    """

    kind: Literal["pinned", "compacted", "exact"]
    start: int
    end: int
    slots: float
    num_cuts: int = 0
    is_refined: bool = False
    text: str = ""


class CompactionView(BaseModel):
    """The report of a compaction: see `am_memory.events.CompactionReport`."""

    start: int
    end: int
    num_slots: float
    kv_tokens_before: float
    kv_tokens_after: float
    kv_bytes_before: int
    kv_bytes_after: int
    mass_error: float
    output_error: float
    query_seconds: float
    score_seconds: float
    fit_seconds: float
    seconds: float
    created: float


class PageView(BaseModel):
    """The compacted tokens [start, end), which are exact for the time being."""

    start: int
    end: int


class SpanView(BaseModel):
    """The tokens [start, end) of the conversation, or of a mounted text, and their text.

    Attributes:
        score: of a search: how much more attention they get than usual, in nats.
        mount: the id of the mounted text; null: they are of the conversation.
    """

    start: int
    end: int
    text: str
    score: float | None = None
    mount: str | None = None


class MountView(BaseModel):
    """A compact text that stands beside the first `at_tokens` tokens; `num_slots` is the mean over the heads."""

    id: str
    num_tokens: int
    num_slots: float
    num_bytes: int
    at_tokens: int


class LayerView(BaseModel):
    """One layer, with the compact slots and the bytes of each KV head. A layer with a sliding window has no slots.

    A recurrent state has neither heads nor slots; its bytes are given as those of one head.

    Attributes:
        exact_tokens: tokens that every head holds uncompacted.
    """

    index: int
    kind: Literal["full", "sliding", "recurrent"]
    exact_tokens: int
    slots: list[int]
    bytes: list[int]


class MemoryView(BaseModel):
    """The memory of one conversation: of its branch that was used last.

    Attributes:
        segments, layers: as they are without recalled pages and mounted texts.
        mounts: the compact texts that are mounted. `stats` count them.
        recalled: the pages that are exact for the time being, in the order of their tokens. `stats` count them.
    """

    id: str
    object: Literal["memory.session"] = "memory.session"
    num_branches: int
    num_messages: int
    trigger_tokens: int
    window_tokens: int
    stats: Stats
    segments: list[SegmentView]
    recalled: list[PageView]
    mounts: list[MountView]
    compactions: list[CompactionView]
    layers: list[LayerView]


def memory_view(id: str, session: Session, num_branches: int) -> MemoryView:
    """The memory of one session. Changes nothing."""
    saved = snapshot(session)
    return MemoryView(
        id=id,
        num_branches=num_branches,
        num_messages=len(saved.messages),
        trigger_tokens=session.trigger_tokens,
        window_tokens=session.engine.info.window_tokens,
        stats=session.stats,
        segments=[part.model_copy(update={"text": _preview(session, part)}) for part in segments(saved)],
        recalled=recalled_pages(session),
        mounts=[_mount(mount) for mount in session.mounts],
        compactions=[CompactionView.model_validate(report) for report in compaction_reports(session)],
        layers=[_layer(index, layer, saved) for index, layer in enumerate(saved.state.layers)],
    )


def segments(saved: SavedSession) -> list[SegmentView]:
    """The segments that cover the conversation, from its first token to the last one read."""
    state = saved.state
    full = [layer for layer in state.layers if isinstance(layer, TailState)]
    num_heads = sum(len(layer.head_slots) for layer in full) or 1
    end = full[0].start + full[0].length if full else 0
    num_pinned = min(state.num_pinned_slots or saved.num_pinned, end)
    views = [SegmentView(kind="pinned", start=0, end=num_pinned, slots=num_pinned)] if num_pinned else []
    refined = {(one.start, one.end) for record in saved.records for one in record.refinements}
    for segment in state.segments:
        views.append(
            SegmentView(
                kind="compacted",
                start=segment.start,
                end=segment.end,
                slots=round(segment.num_slots / num_heads, 2),
                num_cuts=_num_cuts(saved.records, segment.start),
                is_refined=(segment.start, segment.end) in refined,
            )
        )
    if (start := views[-1].end if views else 0) < end:
        views.append(SegmentView(kind="exact", start=start, end=end, slots=end - start))
    return views


def text_view(session: Session, start: int, end: int) -> SpanView:
    """The text of the tokens [start, end), or of the first `MAX_TEXT_TOKENS` of them.

    Raises:
        InvalidInput: the span is empty, or not within the conversation.
    """
    if not 0 <= start < end <= len(session.tokens):
        raise InvalidInput(
            f"there is no text between tokens {start} and {end}: give a span within the {len(session.tokens)} tokens "
            "of the conversation"
        )
    end = min(end, start + MAX_TEXT_TOKENS)
    return SpanView(start=start, end=end, text=session.engine.decode(session.tokens[start:end], skip_special=True))


def span_view(span: Span) -> SpanView:
    """A result of a search."""
    mount = None if span.mount is None else _id_of(span.mount)
    return SpanView(start=span.start, end=span.end, text=span.text, score=span.score, mount=mount)


def _preview(session: Session, part: SegmentView) -> str:
    """The first and the last words of a segment: no more of its tokens are decoded, however long it is."""
    tokens = session.tokens[part.start : part.end]
    decode = partial(session.engine.decode, skip_special=True)
    if len(tokens) <= 2 * PREVIEW_TOKENS:
        return _one_line(decode(tokens))
    return f"{_one_line(decode(tokens[:PREVIEW_TOKENS]))} … {_one_line(decode(tokens[-PREVIEW_TOKENS:]))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def recalled_pages(session: Session) -> list[PageView]:
    """The compacted pages that are exact now, in the order of their tokens."""
    return [PageView(start=page.start, end=page.end) for page in sorted(session.recalled)]


def _mount(mount: Mount) -> MountView:
    about = mount.text
    return MountView(
        id=_id_of(about.name),
        num_tokens=about.num_tokens,
        num_slots=round(about.num_slots, 2),
        num_bytes=about.num_bytes,
        at_tokens=mount.at_tokens,
    )


def _id_of(name: str) -> str:
    """The id of a compact text: its name without the owner."""
    return name.partition("/")[2]


def _num_cuts(records: tuple[CompactionRecord, ...], start: int) -> int:
    """How often the segment that begins at `start` was shrunk, or compacted again."""
    planned = [segment for record in records for segment in record.plan.segments if segment.start == start]
    return sum(before != after for before, after in pairwise(planned))


def _layer(index: int, layer: LayerState, saved: SavedSession) -> LayerView:
    if isinstance(layer, RecurrentState):
        return LayerView(index=index, kind="recurrent", exact_tokens=0, slots=[0], bytes=[layer.nbytes])
    if not isinstance(layer, TailState):
        tensors: list[Any] = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
        num_heads = tensors[0].shape[1] if tensors else 0
        num_tokens = tensors[0].shape[2] if tensors else 0
        per_head = layer.nbytes // max(num_heads, 1)
        return LayerView(
            index=index, kind="sliding", exact_tokens=num_tokens, slots=[0] * num_heads, bytes=[per_head] * num_heads
        )
    num_pinned = saved.state.num_pinned_slots
    head_slots = layer.head_slots
    exact = 0 if layer.buffer is None else (layer.buffer.key.nbytes + layer.buffer.value.nbytes) // len(head_slots)
    per_slot = 0
    if layer.slots is not None and layer.slots.num_slots:
        per_slot = sum(tensor.nbytes for tensor in layer.slots.tensors) // layer.slots.num_slots
    return LayerView(
        index=index,
        kind="full",
        exact_tokens=num_pinned + layer.length,
        slots=[count - num_pinned if layer.slots is not None else 0 for count in head_slots],
        bytes=[exact + count * per_slot for count in head_slots],
    )
