"""What the memory needs of whatever runs the model. Knows nothing of policies or compaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from am_memory.kv_cache.cache import Snapshot
from am_memory.kv_cache.slots import Segment, Slots

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Message = Mapping[str, object]
"""One chat message as chat templates take it: {"role": ..., "content": ...}."""

Tool = Mapping[str, object]
"""A function that the model may call: {"type": "function", "function": {"name", "description", "parameters"}}."""

OnQuery = Callable[[int, Tensor, Tensor], None]
"""Called with (index among the compactable layers, query, log_mass).

query: (num_key_value_heads, num_key_value_groups, num_tokens, head_dim), after RoPE.
log_mass: (num_key_value_heads, num_key_value_groups, num_tokens) float32, log of the sum of exp(score) over all keys.
"""


@dataclass(frozen=True)
class ModelInfo:
    """What the memory has to know of a model.

    Attributes:
        name: for people.
        fingerprint: equal for two models exactly if their caches can be exchanged.
        vocab_size: token ids are below it.
        window_tokens: positions that the model was trained on.
        device: where caches live.
        eos_token_ids: any of them ends a turn.
        tokenizer_fingerprint: equal for two tokenizers if tokens of one are those of the other; "": it is not known.
        template_fingerprint: equal for two chat templates if they write the same; "": there is none, or nobody knows.
        max_tokens: positions that the model has at all; None: as many as there are tokens.
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


@dataclass(frozen=True)
class Capabilities:
    """What an engine and its caches can do beyond reading, rewinding and compacting; a policy may ask for no more.

    Attributes:
        has_ragged_heads: heads may differ in their number of slots; else each head has one slot in every cell.
        can_exchange_slots: `SessionCache.restore` takes a state in which other slots stand for a segment. Recall needs
            it, to make a segment exact and compact again.
        can_hold_int8: slots may come with keys and values in int8 (`Quantised`), and stay so.
        can_compact_layerwise: caches are `LayerwiseCache`.
        can_read_in_parallel: two threads may read into two caches at once.
        can_rotate_keys: `SessionLayer.turned` works, and `SessionCache.compacted` moves segments by their `shift`.
        why_keys_stay: the reason, for messages, where keys cannot be rotated.
        runs_in_generate: caches are `KVCache`, and `generate()` of transformers takes them.
    """

    has_ragged_heads: bool = False
    can_exchange_slots: bool = False
    can_hold_int8: bool = False
    can_compact_layerwise: bool = False
    can_read_in_parallel: bool = False
    can_rotate_keys: bool = False
    why_keys_stay: str = "its engine does not rotate keys"
    runs_in_generate: bool = False


@dataclass(frozen=True)
class ControlTokens:
    """Tokens that nobody says, by their text: only the chat template may write them.

    Attributes:
        turns: those that begin or end something, such as a turn: all special tokens, and others that the template
            writes around messages.
        tags: others that it writes within a turn, such as `<think>`: the model's own messages may hold them.
        unknown: the token that the tokenizer gives for what its vocabulary cannot spell, if there is one.
    """

    turns: Mapping[str, int]
    tags: Mapping[str, int]
    unknown: int | None = None


class SessionLayer(Protocol):
    """What a compaction reads of one compactable layer."""

    @property
    def start(self) -> int:
        """Logical position of the first exact entry."""
        ...

    @property
    def scaling(self) -> float | None:
        """Factor of the scores before the softmax."""
        ...

    @property
    def slots(self) -> Slots | None:
        """The compact entries before the exact ones."""
        ...

    @property
    def rotations(self) -> Tensor | None:
        """What turns a query to each of some later positions, (num_distances, head_dim, head_dim).

        For slots that have no bias of their own: it is folded into their keys, and has to hold for later queries too.
        None: slots have one.
        """
        ...

    def exact_entries(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The exact keys and values at logical positions [start, end): (num_heads, end - start, head_dim)."""
        ...

    def turned(self, key: Tensor, distance: int) -> Tensor:
        """Keys of the layer, (num_heads, num_keys, head_dim), as they would be so many positions later."""
        ...


class SessionCache(Protocol):
    """The cache of one session: `am_memory.kv_cache.cache.KVCache`, or what an engine has in its place.

    A snapshot must be cheap, as one is taken at every token, and restoring it exact, as long as nothing but what came
    after it was forgotten before other tokens were read.
    """

    @property
    def is_croppable(self) -> bool:
        """Whether the last exact tokens can be dropped."""
        ...

    @property
    def segments(self) -> tuple[Segment, ...]: ...

    @property
    def compactable(self) -> Sequence[SessionLayer]:
        """The layers of full attention."""
        ...

    @property
    def num_pinned(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Logical length."""
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
    def num_heads(self) -> int:
        """KV heads of all compactable layers together."""
        ...

    @property
    def kv_tokens(self) -> float:
        """Physical size: exact tokens + mean compact slots per head."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def exact_nbytes(self) -> int:
        """What an uncompacted cache of the same tokens would take."""
        ...

    def state(self) -> Snapshot: ...

    def restore(self, state: Snapshot) -> None:
        """Go back, or on, to a state of such a cache."""
        ...

    def load(self, saved: Snapshot) -> None:
        """Take in a saved state, which is new to this process.

        Raises:
            CorruptSession: the tensors are not the content of such a cache.
        """
        ...

    def truncate(self, num_tokens: int) -> None:
        """Forget everything after the first `num_tokens` logical tokens; the rest must be in the exact tail."""
        ...

    def fork(self) -> SessionCache:
        """A second cache with the same content."""
        ...

    def compacted(self, segments: Sequence[Segment], new_slots: Sequence[Slots], num_pinned: int) -> Snapshot:
        """The state in which `new_slots` stand for the tail's tokens up to the end of the last of `segments`.

        Args:
            segments: all segments afterwards, the new one last; older ones are cut to their `num_slots` and turned to
                their `shift`, and those that are not among them give way to the new one.
            new_slots: the new segment's slots of each compactable layer, ranked within the segment.
            num_pinned: tokens at the start of the tail that stay exact (only before the first compaction).
        """
        ...


class LayerwiseCache(SessionCache, Protocol):
    """A cache whose layers can be compacted one by one, in the middle of a forward pass."""

    def compact_layer(self, index: int, segments: Sequence[Segment], new_slots: Slots, num_pinned: int) -> None:
        """Have one compactable layer as `compacted` makes it; the attention under way goes on over what it holds then.

        Called from `on_query`, at the layer whose queries these are.

        Args:
            new_slots: the new segment's slots of this layer.
            index, segments, num_pinned: as `on_query` and `compacted` have them.
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
        """How many tokens to read in one forward pass: enough to keep the device busy, few enough for its memory."""
        ...

    def new_cache(self) -> SessionCache: ...

    def forward(
        self, cache: SessionCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
    ) -> Tensor:
        """Read tokens into the cache.

        Args:
            cache: grows by len(token_ids).
            token_ids: at least one.
            num_logits: for how many of the last tokens logits are wanted.
            on_query: gets every layer's queries of these tokens.

        Returns:
            (num_logits, vocab_size) float32.
        """
        ...

    def encode(self, text: str, *, add_special: bool = False, as_text: bool = False) -> list[int]:
        """Token ids of the text.

        Args:
            add_special: with what the model wants at the start of a text (often BOS).
            as_text: what spells a special token is no such token.
        """
        ...

    @property
    def control_tokens(self) -> ControlTokens: ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str: ...

    @property
    def has_chat_template(self) -> bool: ...

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The messages as the model's chat template writes them; it may leave out `tools`."""
        ...


def in_chunks(token_ids: Sequence[int], chunk_tokens: int) -> Iterator[Sequence[int]]:
    """The tokens in order, `chunk_tokens` at a time: one chunk for each forward pass."""
    return (token_ids[start : start + chunk_tokens] for start in range(0, len(token_ids), chunk_tokens))


class Branches(Protocol):
    """Texts that go on behind one cache, side by side: each sees what the cache holds, and itself."""

    @property
    def logits(self) -> Tensor:
        """(num_branches, vocab_size) float32: what each of them expects next."""
        ...

    def read(self, branches: Sequence[int], token_ids: Sequence[int]) -> None:
        """Read one more token into each of some branches; the others end, and these are all there are from then on."""
        ...


@runtime_checkable
class Branching(Protocol):
    """What an engine has beside, where a forward pass can read a token of each of several texts."""

    def branches(self, cache: SessionCache, beginnings: Sequence[Sequence[int]]) -> Branches | None:
        """Texts that begin with these tokens behind the cache, which stays as it is; None where it has no room for it.

        Args:
            beginnings: of each text, at least one token.
        """
        ...


@runtime_checkable
class OwnVocabulary(Protocol):
    """What an engine answers beside, for constrained answers, where it has no `tokenizer` of transformers."""

    def grammar_tokenizer(self) -> LLTokenizer: ...

    def token_texts(self) -> Mapping[str, int]:
        """Tokens by their text."""
        ...
