"""The protocol between the memory and an engine: what an engine, its caches and their layers must answer.

An engine runs one model. `Engine`, `SessionCache` and `SessionLayer` are the minimum; `Capabilities` says what it can
do beyond that. `tests/engines/toy/toy_engine.py` is a complete engine in 200 lines. Knows no policy and no compaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.slots import Segment, Slots

Message = Mapping[str, object]
"""One chat message, as chat templates take it: {"role": ..., "content": ...}."""

Tool = Mapping[str, object]
"""A function that the model may call: {"type": "function", "function": {"name", "description", "parameters"}}."""

OnQuery = Callable[[int, Tensor, Tensor], None]
"""Called with (index among the compactable layers, query, log_mass), once for each layer and forward pass.

query: (num_key_value_heads, num_key_value_groups, num_tokens, head_dim), after RoPE. Where several layers of a model
attend to the keys of one, the groups are the query heads of all of them.
log_mass: (num_key_value_heads, num_key_value_groups, num_tokens) float32, the log of the sum of exp(score) over all
keys that the query attends to, slots with their biases among them, and over its attention sink, if the model has one.
"""


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model.

    Attributes:
        name: for people.
        fingerprint: equal for two models if and only if one can use the other's caches.
        vocab_size: every token id is below it.
        window_tokens: the context window: positions that the model was trained on.
        device: where caches live.
        eos_token_ids: each of them ends a turn.
        tokenizer_fingerprint: equal for two tokenizers if they give the same tokens for every text; "": unknown.
        template_fingerprint: equal for two chat templates if they render the same; "": there is none, or it is unknown.
        max_tokens: positions that the model has at all; None: no limit.
    """

    name: str
    fingerprint: str
    vocab_size: int
    window_tokens: int
    device: torch.device
    eos_token_ids: frozenset[int]
    tokenizer_fingerprint: str = ""
    template_fingerprint: str = ""
    max_tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.name} on {self.device}, context window of {self.window_tokens:,} tokens"


@dataclass(frozen=True)
class Capabilities:
    """The abilities of an engine beyond the minimum. A policy that needs more is refused with `InvalidPolicy`.

    Attributes:
        has_ragged_heads: the heads of a layer may differ in their number of slots (head budgets, calibration).
        can_exchange_slots: `SessionCache.restore` takes a state in which other slots stand for a segment (recall).
        can_hold_int8: new slots may have keys and values in int8, as `Quantised` (`segment_dtype="int8"`).
        can_refine: caches are `RefinableCache`: no layer has a sliding window, whose old entries are gone, or a
            recurrent state (`Session.refine`).
        can_compact_layerwise: caches are `LayerwiseCache` (`on_policy`).
        can_read_in_parallel: two threads may read into two caches at the same time (`ahead_tokens`).
        can_rotate_keys: `SessionLayer.rotated` works for any distance, and `SessionCache.compacted` moves segments by
            their `shift` (summaries, and conversations that are longer than the context window).
        why_keys_stay: the reason if keys cannot be rotated, for messages.
        free_query_tokens: a pass over at least so many tokens costs and rounds the same with `on_query` as without (the
            queries of messages are then kept for recall, instead of reading these twice); None: no pass does.
        runs_in_generate: caches are `KVCache`, and `generate()` of transformers takes them (`Memory.cache`).
    """

    has_ragged_heads: bool = False
    can_exchange_slots: bool = False
    can_hold_int8: bool = False
    can_refine: bool = False
    can_compact_layerwise: bool = False
    can_read_in_parallel: bool = False
    can_rotate_keys: bool = False
    why_keys_stay: str = "its engine does not rotate keys"
    free_query_tokens: int | None = None
    runs_in_generate: bool = False


@dataclass(frozen=True)
class ControlTokens:
    """Tokens that only the chat template may write, by their text.

    Attributes:
        turns: tokens that begin or end something, such as a turn: all special tokens, and others that the template
            writes around messages.
        tags: other tokens that the template writes within a turn, such as `<think>`; the model may write them too.
        unknown: the token for text that the vocabulary cannot spell, if the tokenizer has one.
    """

    turns: Mapping[str, int]
    tags: Mapping[str, int]
    unknown: int | None = None


class SessionLayer(Protocol):
    """One compactable layer of a cache, as a compaction reads it."""

    @property
    def start(self) -> int:
        """Logical position of the first exact entry."""
        ...

    @property
    def scaling(self) -> float | None:
        """Factor of the scores before the softmax; None before the first forward pass."""
        ...

    @property
    def softcap(self) -> float | None:
        """Scaled scores s are softcap * tanh(s / softcap) before a bias is added; None: they are not capped."""

    @property
    def sinks(self) -> Tensor | None:
        """Logits of the query heads' attention sinks, (num_attention_heads,), which log masses include; None: none."""

    @property
    def slots(self) -> Slots | None:
        """The compact entries, which stand before the exact ones; None before the first compaction."""
        ...

    @property
    def query_rotations(self) -> Tensor | None:
        """Rotations of a query to later positions, (num_distances, head_dim, head_dim); None if slots keep biases.

        An engine whose slots have no bias folds biases into the keys. The folded keys must also suit later queries.
        """
        ...

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Exact keys and values at the logical positions [start, end): (num_heads, end - start, head_dim) each."""
        ...

    def rotated(self, key: Tensor, distance: int | Tensor) -> Tensor:
        """Keys rotated to later positions.

        Args:
            key: (num_heads, num_keys, head_dim), after RoPE.
            distance: in positions, one for all keys or (num_keys,) int64 in host memory; below 0, to earlier positions.
                Always 0 if the engine cannot rotate keys.
        """
        ...


class SessionCache(Protocol):
    """The cache of one session: `[pinned exact][segment 1]...[segment n][exact tail]`.

    `KVCache` is the one for transformers. A memory takes a snapshot before every token, so `state` must be cheap: a
    few references. `restore` must be exact, also after other tokens were read in the meantime.
    """

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The compacted tokens, in order."""
        ...

    @property
    def num_pinned_slots(self) -> int:
        """Exact slots of pinned tokens before the segments; 0 until the first compaction, when the tail has them."""
        ...

    @property
    def num_tokens(self) -> int:
        """Logical length: tokens read, compacted or not."""
        ...

    @property
    def tail_start(self) -> int:
        """Where the exact tail begins: the end of the last segment, or 0."""
        ...

    @property
    def num_exact_tokens(self) -> int:
        """Pinned tokens and those of the tail."""
        ...

    @property
    def compactable(self) -> Sequence[SessionLayer]:
        """The layers of full attention, as they are now."""
        ...

    @property
    def num_heads(self) -> int:
        """KV heads of all compactable layers together."""
        ...

    @property
    def kv_tokens(self) -> float:
        """Physical size in tokens: exact tokens, and the mean number of compact slots per head."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory that keys, values and biases take."""
        ...

    @property
    def exact_nbytes(self) -> int:
        """Memory that an uncompacted cache of the same tokens would take."""

    @property
    def can_drop_tokens(self) -> bool:
        """Whether `is_croppable` holds for any text. Caches of other models go back to checkpoints."""

    @property
    def is_croppable(self) -> bool:
        """Whether `truncate` can drop the last exact tokens; a full sliding window or a recurrent state cannot."""

    def state(self) -> Snapshot:
        """A snapshot, immutable and cheap."""
        ...

    def restore(self, state: Snapshot) -> None:
        """Return to a state of this cache, or take one of another cache of the same engine."""
        ...

    def load(self, saved: Snapshot) -> None:
        """Take in a state that was saved by another process, into a new cache.

        Raises:
            CorruptSession: no cache of this engine can have this state.
        """
        ...

    def truncate(self, num_tokens: int) -> None:
        """Forget all but the first `num_tokens` logical tokens; what is forgotten must be in the exact tail."""
        ...

    def fork(self) -> SessionCache:
        """A second cache with the same content; it should share memory until the two differ."""
        ...

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> Snapshot:
        """The state after a compaction; the cache itself does not change.

        Args:
            segments: all segments afterwards, the new one last. Older ones are cut to their `num_slots` and rotated by
                the change of their `shift`. Held segments that are missing here are dropped: the new one replaces them.
            new_slots: the new segment's slots, one `Slots` for each compactable layer, ranked within the segment.
            num_pinned: tokens at the start of the tail that stay exact; it matters at the first compaction only.
        """
        ...


class LayerwiseCache(SessionCache, Protocol):
    """A cache whose layers can be compacted one by one, in the middle of a forward pass."""

    def compact_layer(self, index: int, segments: Sequence[Segment], new_slots: Slots, num_pinned: int) -> None:
        """Compact one layer in place.

        Called from `on_query`, at the layer whose queries these are. The layer's attention in the pass under way must
        then be computed over its new content.

        Args:
            index: among the compactable layers.
            new_slots: the new segment's slots of this layer.
            segments, num_pinned: see `compacted`.
        """
        ...


class RefinableCache(SessionCache, Protocol):
    """A cache that can be put together as it was when one of its segments was still exact."""

    def before(self, segment: Segment, entries: Sequence[tuple[Tensor, Tensor]]) -> Snapshot:
        """The state that ends with a segment, whose tokens are exact again; the cache itself does not change.

        Pinned tokens and older segments are as they are now, and stand before the segment as far as its `shift` tells.
        Later tokens are missing.

        Args:
            segment: one of `segments`.
            entries: keys and values of its tokens in each compactable layer, as they were written, on any device.
        """
        ...


class Engine(Protocol):
    """A model and its tokenizer, on one device."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def chunk_tokens(self) -> int:
        """Tokens to read in one forward pass: enough to keep the device busy, few enough for its memory."""
        ...

    def new_cache(self) -> SessionCache:
        """An empty cache."""
        ...

    def forward(
        self, cache: SessionCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
    ) -> Tensor:
        """Read tokens into the cache, in one forward pass.

        Args:
            cache: grows by len(token_ids).
            token_ids: at least one.
            num_logits: return logits for this many of the last tokens.
            on_query: called with every compactable layer's queries of these tokens.

        Returns:
            (num_logits, vocab_size) float32.
        """
        ...

    def encode(self, text: str, *, add_special: bool = False, as_text: bool = False) -> list[int]:
        """Token ids of a text. `add_special`: with what the model expects before it. `as_text`: no special tokens."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids, with or without the spelling of special tokens."""
        ...

    @property
    def control_tokens(self) -> ControlTokens: ...

    @property
    def has_chat_template(self) -> bool: ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """Messages as the chat template writes them; `options` are its other variables, such as `enable_thinking`.

        Raises:
            InvalidInput: the template does not take these messages.
        """
        ...


def in_chunks(token_ids: Sequence[int], chunk_tokens: int) -> Iterator[Sequence[int]]:
    """The tokens in order, `chunk_tokens` at a time: one chunk for each forward pass."""
    return (token_ids[start : start + chunk_tokens] for start in range(0, len(token_ids), chunk_tokens))
