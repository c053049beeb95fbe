"""What the memory needs of whatever runs the model. Knows nothing of policies or compaction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from am_memory.cache import KVCache

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
    """

    name: str
    fingerprint: str
    vocab_size: int
    window_tokens: int
    device: torch.device
    eos_token_ids: frozenset[int]


class Engine(Protocol):
    """A model and its tokenizer, on one device."""

    @property
    def info(self) -> ModelInfo: ...

    def new_cache(self) -> KVCache: ...

    def forward(
        self, cache: KVCache, token_ids: Sequence[int], *, num_logits: int = 0, on_query: OnQuery | None = None
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

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of the text; `add_special`: with what the model wants at the start of a text (often BOS)."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = False) -> str: ...

    @property
    def has_chat_template(self) -> bool: ...

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The messages as the model's chat template writes them; it may leave out `tools`."""
        ...
