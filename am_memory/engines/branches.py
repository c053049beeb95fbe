"""Several texts that continue one cache, read as a batch.

The cache's entries exist once, and all queries attend to them together. Behind them each text has its own entries.
Does not know what the texts are for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from am_memory.engines.partwise import merge, partial_attention, past_parts
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer

BranchEntries = tuple[Tensor, Tensor]
"""Keys and values, (num_key_value_heads, num_tokens, head_dim)."""

Step = Callable[[Tensor, Tensor, Cache], Tensor]
"""Reads token ids (num_branches, 1) at positions (num_branches, 1); returns logits (num_branches, vocab_size)."""


class BranchLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer: the entries that `past` has now, shared by all branches, and each branch's own, padded on the left."""

    is_sliding = False

    def __init__(self, past: CompactableLayer, beginnings: Sequence[BranchEntries]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_past = past.get_seq_length()
        lengths = torch.tensor([key.shape[1] for key, _ in beginnings], device=beginnings[0][0].device)
        longest = int(lengths.max())
        self.num_padding = longest - lengths  # (num_branches,)
        # (num_branches, num_key_value_heads, longest, head_dim)
        self.key, self.value = (
            torch.stack([torch.nn.functional.pad(part, (0, 0, longest - part.shape[1], 0)) for part in parts])
            for parts in zip(*beginnings, strict=True)
        )
        self._past = past.tail if past.is_initialized else (self.key[:1, :, :0], self.value[:1, :, :0])
        self._slots = past.slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: every branch has entries from the start."""

    def keep(self, branches: Tensor) -> None:
        """End all branches but these."""
        self.key, self.value, self.num_padding = self.key[branches], self.value[branches], self.num_padding[branches]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> BranchEntries:
        """Append (num_branches, num_key_value_heads, 1, head_dim)."""
        self.key = torch.cat([self.key, key_states], dim=2)
        self.value = torch.cat([self.value, value_states], dim=2)
        self.key.am_layer = self  # type: ignore[attr-defined]
        return self.key, self.value

    def attend(self, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention of each newest token.

        Args:
            query: (num_branches, num_attention_heads, 1, head_dim).

        Returns:
            The output, (num_branches, num_attention_heads, 1, value_dim); and the log of each query's attention mass,
            (the same without value_dim).
        """
        num_branches, num_heads, num_keys, head_dim = self.key.shape
        grouped = query.view(num_branches, num_heads, -1, head_dim)
        is_padding = torch.arange(num_keys, device=query.device) < self.num_padding[:, None]
        bias = query.new_zeros(is_padding.shape).masked_fill_(is_padding, -torch.inf)[:, None, None]
        own_output, own_mass = partial_attention(grouped, self.key, self.value, bias, scaling)

        def packed(tensor: Tensor) -> Tensor:
            """The queries of all branches side by side in each head, as if they were of one text."""
            return tensor.transpose(0, 1).flatten(1, 2)[None]

        slots = self._slots.decoded() if self._slots is not None else None
        past = past_parts(packed(grouped), *self._past, slots, scaling)
        output, log_mass = merge([(packed(own_output), packed(own_mass)), *past])
        output = output.view(num_heads, num_branches, -1, output.shape[3]).transpose(0, 1)
        output = output.reshape(*query.shape[:3], -1)
        return output, log_mass.view(num_heads, num_branches, -1).transpose(0, 1).reshape(query.shape[:3])

    def get_seq_length(self) -> int:
        """Logical length of the longest branch."""
        return self.num_past + self.key.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens; the attention function makes earlier ones visible."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1


def begin(
    read: Callable[[Sequence[int]], Tensor], cache: KVCache, beginnings: Sequence[Sequence[int]]
) -> tuple[list[list[BranchEntries]], Tensor]:
    """Read the first tokens of some texts, each behind a cache, which is put back.

    Args:
        read: reads tokens into the cache; returns the last one's logits, (1, vocab_size).
        beginnings: the first tokens of each text.

    Returns:
        For each text the entries of these tokens in each layer; and the logits, (num_texts, vocab_size).
    """
    state, start = cache.state(), cache.num_tokens
    begun, logits = [], []
    for token_ids in beginnings:
        try:
            logits.append(read(token_ids))
            entries = [layer.exact_entries(start, start + len(token_ids)) for layer in cache.compactable]
            begun.append([(key.clone(), value.clone()) for key, value in entries])
        finally:
            cache.restore(state)
    return begun, torch.cat(logits)


class TextBranches:
    """`Branches` behind a `KVCache`.

    Args:
        past: the layers of the cache that the branches continue, with their entries as they are now.
        beginnings: for each branch, the entries of its first tokens in each layer.
        logits: (num_branches, vocab_size), after these tokens.
        step: one forward pass of the model.
        held_rope: that of the cache.
    """

    def __init__(
        self,
        past: Sequence[CompactableLayer],
        beginnings: Sequence[Sequence[BranchEntries]],
        logits: Tensor,
        step: Step,
        held_rope: object = None,
    ) -> None:
        self.logits = logits
        self._step = step
        self._layers = [BranchLayer(*layer) for layer in zip(past, zip(*beginnings, strict=True), strict=True)]
        self._cache = Cache(layers=[*self._layers])
        self._cache.held_rope = held_rope  # type: ignore[attr-defined]

    def advance(self, branches: Sequence[int], token_ids: Sequence[int]) -> None:
        if len(branches) < len(self.logits):
            kept = torch.tensor(branches)  # in host memory: layers may be on several devices
            for layer in self._layers:
                layer.keep(kept)
        first = self._layers[0]
        positions = first.get_seq_length() - first.num_padding
        self.logits = self._step(torch.tensor(token_ids)[:, None], positions[:, None], self._cache)
