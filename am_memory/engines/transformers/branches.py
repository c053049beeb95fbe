"""Several texts behind one cache, a token of each in one forward pass.

What the cache holds is there once, and all queries attend to it together; behind it each text has entries of its own.
Knows nothing of what the texts are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from am_memory.engines.transformers.partwise import merge, partial_attention, past_parts
from am_memory.kv_cache.layers import CompactableLayer

Entries = tuple[Tensor, Tensor]
"""Keys and values, (num_key_value_heads, num_tokens, head_dim)."""

Step = Callable[[Tensor, Tensor, Cache], Tensor]
"""Reads token ids (num_branches, 1) at positions (num_branches, 1); gives logits (num_branches, vocab_size)."""


class BranchLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: what `past` holds now, for all branches, and the entries of each, padded at the left to one length."""

    is_sliding = False

    def __init__(self, past: CompactableLayer, beginnings: Sequence[Entries]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_past = past.get_seq_length()
        lengths = torch.tensor([key.shape[1] for key, _ in beginnings], device=beginnings[0][0].device)
        longest = int(lengths.max())
        self.num_padding = longest - lengths  # (num_branches,)
        # (num_branches, num_key_value_heads, longest, head_dim)
        self.key, self.value = (
            torch.stack([torch.nn.functional.pad(of, (0, 0, longest - of.shape[1], 0)) for of in each])
            for each in zip(*beginnings, strict=True)
        )
        self._past = past.tail if past.is_initialized else (self.key[:1, :, :0], self.value[:1, :, :0])
        self._slots = past.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: every branch has begun."""

    def keep(self, branches: Tensor) -> None:
        """Only these go on."""
        self.key, self.value, self.num_padding = self.key[branches], self.value[branches], self.num_padding[branches]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Entries:
        """Append (num_branches, num_key_value_heads, 1, head_dim)."""
        self.key = torch.cat([self.key, key_states], dim=2)
        self.value = torch.cat([self.value, value_states], dim=2)
        self.key.am_layer = self  # type: ignore[attr-defined]
        return self.key, self.value

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of each branch's newest token: (num_branches, num_attention_heads, 1, head_dim), and so is it."""
        num_branches, num_heads, num_keys, head_dim = self.key.shape
        grouped = query.view(num_branches, num_heads, -1, head_dim)
        is_padding = torch.arange(num_keys, device=query.device) < self.num_padding[:, None]
        bias = query.new_zeros(is_padding.shape).masked_fill_(is_padding, -torch.inf)[:, None, None]
        own_output, own_mass = partial_attention(grouped, self.key, self.value, bias, scaling)

        def packed(of: Tensor) -> Tensor:
            """All branches' queries of a head in a row, as if they were of one text."""
            return of.transpose(0, 1).flatten(1, 2)[None]

        slots = self._slots.decoded() if self._slots is not None else None
        past = past_parts(packed(grouped), *self._past, slots, scaling)
        output, _ = merge([(packed(own_output), packed(own_mass)), *past])
        return output.view(num_heads, num_branches, -1, head_dim).transpose(0, 1).reshape(query.shape)

    def get_seq_length(self) -> int:
        """Logical length of the longest branch."""
        return self.num_past + self.key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens: the attention function knows what is visible before them."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1


class TextBranches:
    """`Branches` of a transformers model.

    Args:
        past: the layers of the cache that all stand behind; what they hold now is what is seen of them.
        beginnings: of each branch, the entries of each layer.
        logits: (num_branches, vocab_size), after the beginnings.
        step: of the model.
        held_rope: as the cache has it.
    """

    def __init__(
        self,
        past: Sequence[CompactableLayer],
        beginnings: Sequence[Sequence[Entries]],
        logits: Tensor,
        step: Step,
        held_rope: object = None,
    ) -> None:
        self.logits = logits
        self._step = step
        self._layers = [BranchLayer(*of_layer) for of_layer in zip(past, zip(*beginnings, strict=True), strict=True)]
        self._cache = Cache(layers=[*self._layers])
        self._cache.held_rope = held_rope  # type: ignore[attr-defined]

    def read(self, branches: Sequence[int], token_ids: Sequence[int]) -> None:
        if len(branches) < len(self.logits):
            kept = torch.tensor(branches)  # in host memory: layers may be on several devices
            for layer in self._layers:
                layer.keep(kept)
        first = self._layers[0]
        positions = first.get_seq_length() - first.num_padding
        self.logits = self._step(torch.tensor(token_ids)[:, None], positions[:, None], self._cache)
