"""Checks of a saved session before it goes on with a model. Knows no store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

from torch import Tensor

from am_memory.compaction.record import RecallRecord
from am_memory.engines.base import ModelInfo, SessionCache
from am_memory.errors import CorruptSession, InvalidPolicy, ModelMismatch, StorageError
from am_memory.events import PolicyChange
from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.int8 import Quantised, Rows
from am_memory.kv_cache.layers import LayerState, RecurrentState, SlidingState, TailState
from am_memory.kv_cache.slots import PINNED_RANK, Slots
from am_memory.policy import MemoryPolicy
from am_memory.recall.paging import Page
from am_memory.storage.compact_text import TextCache
from am_memory.storage.session_file import SavedSession


def check_origin(name: str, saved: SavedSession, info: ModelInfo) -> tuple[str, ...]:
    """Check that a session was saved with this model, this tokenizer and, where it has messages, this chat template.

    Returns:
        The parts among these that the saved session does not name.

    Raises:
        ModelMismatch: it was saved with another one, which the message names.
    """
    parts = [
        ("model", saved.fingerprint, info.fingerprint),
        ("tokenizer", saved.tokenizer_fingerprint, info.tokenizer_fingerprint),
    ]
    if saved.messages:
        parts.append(("chat template", saved.template_fingerprint, info.template_fingerprint))
    others = [(what, before, now) for what, before, now in parts if before and now and before != now]
    if others:
        saved_with = " and ".join(f"{what} {before}" for what, before, _ in others)
        this = " and ".join(f"{what} {now}" for what, _, now in others)
        raise ModelMismatch(
            f"session {name!r} was saved with {saved_with}, and {info.name} has {this}: load the "
            f"{' and the '.join(what for what, *_ in others)} that it was saved with, or choose another name"
        )
    return tuple(what for what, before, now in parts if now and not before)


def policy_of(name: str, saved: SavedSession, policy: MemoryPolicy, *, is_default: bool) -> MemoryPolicy:
    """The policy under which a saved session goes on: its own, if it had one, else the memory's.

    Args:
        policy: the memory's.
        is_default: no policy was given to the memory, so the saved one is used.

    Raises:
        StorageError: the saved policy is needed, and is not valid.
    """
    if not changes_of(saved, policy) or not (saved.has_own_policy or is_default):
        return policy
    try:
        return MemoryPolicy.model_validate(saved.policy)
    except InvalidPolicy as error:
        raise StorageError(
            f"session {name!r} cannot go on under the policy that it was saved with: {error}; name one: "
            f"memory.session({name!r}, policy=...)"
        ) from error


def changes_of(saved: SavedSession, policy: MemoryPolicy) -> tuple[PolicyChange, ...]:
    """The fields in which a policy differs from the one that a session was saved with."""
    before = {**MemoryPolicy().model_dump(mode="json"), **saved.policy}
    now = policy.model_dump(mode="json")
    return tuple(
        PolicyChange(field, before.get(field), now.get(field))
        for field in sorted({*before, *now})
        if before.get(field) != now.get(field)
    )


def check_content(name: str, saved: SavedSession, info: ModelInfo, like: Snapshot) -> None:
    """Check that this model could have made a session. Its file may be forged, and claim anything.

    Args:
        like: the state of a cache of this model that holds one token.

    Raises:
        CorruptSession: the model cannot have made it; the message says why.
    """
    problem = _problem_of_text(saved, info) or _problem_of_layers(saved, like) or _problem_of_records(saved)
    problem = problem or _problem_of_queries(saved, like)
    for _, text in saved.texts:
        problem = problem or _problem_of_mounted(text, info, like)
    for layer in saved.state.layers:
        problem = problem or _problem_of_slots(layer, saved.state)
    if problem:
        raise _corrupt(name, problem)


def load(name: str, saved: SavedSession, cache: SessionCache) -> None:
    """Take the saved state into a new cache; raises CorruptSession as `check_content` does."""
    try:
        cache.load(saved.state)
    except CorruptSession as error:
        raise _corrupt(name, str(error)) from error


def _corrupt(name: str, problem: str) -> CorruptSession:
    return CorruptSession(
        f"session {name!r} cannot have been made by this model: {problem}; restore it from a copy, or delete it"
    )


def _problem_of_text(saved: SavedSession, info: ModelInfo) -> str:
    written = (
        token_ids
        for made in saved.records
        for conversations in (made.conversations, *(one.conversations for one in made.refinements))
        for token_ids in (*conversations, *(made.summary or ()))
    )
    if any(not 0 <= token_id < info.vocab_size for token_id in chain(saved.tokens, *written)):
        return f"it has token ids outside of the vocabulary of {info.vocab_size}"
    if strange := [one for one in saved.mount_records if one.seen_from > max(one.at_tokens, info.window_tokens)]:
        return f"it has a text that is seen from token {strange[0].seen_from}, behind a window of {info.window_tokens}"
    if saved.is_answering and not (saved.messages and isinstance(saved.messages[-1].get("content"), str)):
        return "it is in the midst of an answer, and has none"
    return ""


def _problem_of_queries(saved: SavedSession, like: Snapshot) -> str:
    if (kept := saved.search_queries) is None:
        return ""
    widths = [_entries(layer)[0].shape[3] for layer in like.layers if isinstance(layer, TailState)]
    for head in kept.heads:
        if not 0 <= head.layer < len(widths) or widths[head.layer] != kept.queries.shape[2]:
            return f"it has queries of {kept.queries.shape[2]} channels, of layer {head.layer}"
    return ""


def _problem_of_layers(saved: SavedSession, like: Snapshot) -> str:
    layers = saved.state.layers
    if [type(layer) for layer in layers] != [type(layer) for layer in like.layers]:
        return f"it has {len(layers)} layers, of other kinds than the model's {len(like.layers)}"
    pairs = list(zip(layers, like.layers, strict=True))
    if len({_entries(layer) == () for layer, model_layer in pairs if _entries(model_layer)}) > 1:
        return "some of its layers hold nothing"
    kinds = [(_kind(layer), _kind(model_layer)) for layer, model_layer in pairs]
    for index, (kind, model_kind) in enumerate(kinds):
        if kind and kind != model_kind:
            return f"layer {index} holds {kind}, where the model has {model_kind}"
    num_heads = sum(_entries(layer)[0].shape[1] for layer in layers if isinstance(layer, TailState) and _entries(layer))
    for segment in chain(saved.state.segments, *(made.plan.segments for made in saved.records)):
        if segment.num_slots > segment.num_tokens * num_heads:
            return f"{segment} has more than a slot for each token of {num_heads} heads"
    return ""


def check_text(text: TextCache, info: ModelInfo, like: Snapshot) -> None:
    """Check that this model could have made a compact text. Its file may be forged, and claim anything.

    Args:
        like: the state of a cache of this model that holds one token.

    Raises:
        ModelMismatch: another model, or another tokenizer, has read it.
        CorruptSession: the model cannot have made it; the message says why.
    """
    for what, before, now in (
        ("model", text.fingerprint, info.fingerprint),
        ("tokenizer", text.tokenizer_fingerprint, info.tokenizer_fingerprint),
    ):
        if before and now and before != now:
            raise ModelMismatch(
                f"the compact text {text.about.name!r} was read by {what} {before}, and {info.name} has {now}: load "
                f"the {what} that read it, or compact the text again"
            )
    if problem := _problem_of_mounted(text, info, like):
        raise CorruptSession(f"{problem}; compact the text again, or delete it")


def _problem_of_mounted(text: TextCache, info: ModelInfo, like: Snapshot) -> str:
    if any(not 0 <= token_id < info.vocab_size for token_id in text.tokens):
        return f"{text.about.name!r} has token ids outside of the vocabulary of {info.vocab_size}"
    layers = [_entries(layer) for layer in like.layers if isinstance(layer, TailState)]
    kinds = [[(slots.num_heads,), _row_kind(slots.key), _row_kind(slots.value)] for slots in text.slots]
    expected = [[(entries[0].shape[1],), *(_row_kind(rows[0, 0]) for rows in entries)] for entries in layers]
    if text.about.num_slots != text.mean_slots:
        return f"{text.about.name!r} has {text.mean_slots} slots, and claims {text.about.num_slots}"
    if kinds != expected:
        return f"the slots of {text.about.name!r} are of layers {kinds}, and the model has {expected}"
    if any(slots.bias.dtype != _row_kind(slots.key)[0] for slots in text.slots):
        return f"{text.about.name!r} has biases of another type than its keys"
    if not all(_is_finite(slots) for slots in text.slots):
        return f"{text.about.name!r} has slots whose bias or scale is no number"
    return ""


def _problem_of_records(saved: SavedSession) -> str:
    """Each compaction must begin where the one before ended, and the last must leave the segments that are there."""
    held: list[tuple[int, int]] = []
    for made in saved.records:
        *older, newest = [(segment.start, segment.end) for segment in made.plan.segments]
        begins = saved.num_pinned if made.plan.is_refit or not held else held[-1][1]
        if older != ([] if made.plan.is_refit else held) or newest[0] != begins or newest[1] > made.at_tokens:
            return f"a compaction of tokens {newest[0]} to {newest[1]} behind segments {held}"
        held = [*older, newest]
        if problem := _problem_of_recalls(made.recalls, held):
            return problem
        if strange := [one for one in made.refinements if (one.start, one.end) not in held]:
            return f"a refined segment of tokens {strange[0].start} to {strange[0].end}, where none is"
    there = [(segment.start, segment.end) for segment in saved.state.segments]
    if there != held:
        return f"its compactions leave segments {held}, and it has {there}"
    if saved.state.num_pinned_slots != (saved.num_pinned if held else 0):
        return f"{saved.state.num_pinned_slots} tokens are pinned, and {saved.num_pinned} should be"
    return ""


def _problem_of_recalls(recalls: Sequence[RecallRecord], segments: Sequence[tuple[int, int]]) -> str:
    """Only tokens of one segment become exact, and only exact pages become compact again."""
    exact = set[tuple[int, int]]()
    for _, start, end, is_exact in recalls:
        is_there = any(Page(start, end).is_within(*held) for held in segments) if is_exact else (start, end) in exact
        if not is_there:
            return f"a page recalled or put away at tokens {start} to {end}, where none is"
        (exact.add if is_exact else exact.discard)((start, end))
    return ""


def _problem_of_slots(layer: LayerState, state: Snapshot) -> str:
    if not isinstance(layer, TailState) or layer.slots is None:
        return ""
    slots = layer.slots
    is_pinned, is_placed = slots.ranks == PINNED_RANK, slots.positions < state.num_pinned_slots
    num_pinned = [int(is_pinned[begin:end].sum()) for begin, end in pairwise(slots.cu_slots)]
    if bool((is_placed != is_pinned).any()) or any(count != state.num_pinned_slots for count in num_pinned):
        return f"its heads have {num_pinned} slots of {state.num_pinned_slots} pinned tokens"
    for segment in state.segments:
        is_placed = is_placed | (slots.positions >= segment.start) & (slots.positions < segment.end)
    if not bool(is_placed.all()):
        return "it has slots of tokens that are in no segment"
    return "" if _is_finite(slots) else "it has slots whose bias or scale is no number"


def _is_finite(slots: Slots) -> bool:
    """Whether biases and scales are numbers."""
    scales = [rows.scale for rows in (slots.key, slots.value) if isinstance(rows, Quantised)]
    return all(bool(numbers.isfinite().all()) for numbers in (slots.bias, *scales))


def _entries(layer: LayerState) -> tuple[Tensor, ...]:
    """Exact keys and values, or recurrent states; empty if nothing was read."""
    if isinstance(layer, RecurrentState):
        return layer.tensors
    if isinstance(layer, SlidingState):
        return () if layer.keys is None or layer.values is None else (layer.keys, layer.values)
    return () if layer.buffer is None else (layer.buffer.key, layer.buffer.value)


def _kind(layer: LayerState) -> list[tuple[object, ...]]:
    """Dtypes, heads and head_dim of a layer's exact entries, and of its compact ones where they differ.

    Dtypes and shapes of recurrent states.
    """
    if isinstance(layer, RecurrentState):
        if not layer.tensors:
            return []
        states = (*layer.conv, *layer.recurrent)
        return [() if state is None else (state.dtype, *state.shape) for state in states]
    exact = [(tensor.dtype, tensor.shape[3]) for tensor in _entries(layer)]
    heads = [(tensor.shape[1],) for tensor in _entries(layer)]
    slots = layer.slots if isinstance(layer, TailState) else None
    compact = exact if slots is None else [_row_kind(rows) for rows in (slots.key, slots.value)]
    return [*heads, *exact, *(compact if compact != exact else ())]


def _row_kind(rows: Rows) -> tuple[object, ...]:
    held = rows.exact if isinstance(rows, Quantised) else rows
    return held.dtype, held.shape[1]
