"""How much a model needs each of its KV heads: what is lost where one head's block alone is compacted.

    a block in the cache  ->  fits of every head at every ratio  ->  a pass for each of them  ->  KL from the full cache

Measured once for a model (arXiv:2602.16284, head budgets). Knows nothing of how slots are shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from am_memory.budgets import Calibration
from am_memory.compaction.compact import Entries, Head, fit_all
from am_memory.compaction.plan import Plan
from am_memory.engines.base import Engine
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.kv_cache.cache import CacheState, KVCache
from am_memory.kv_cache.layers import CompactableLayer, TailBuffer, TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import SINK_TOKENS, MemoryPolicy
from am_memory.queries import ReferenceQueries, repeat_queries
from am_memory.queries.repeat_prefill import repeat_request
from am_memory.solver import exact_attention

RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Slots for each key of the block, at least one in all."""
CONTINUATION_TOKENS = 64
"""Read behind the block."""
MIN_BLOCK_TOKENS = 100
"""In a smaller one the ratios are no different numbers of slots."""


def calibrate(
    engine: Engine,
    texts: Sequence[str],
    *,
    block_tokens: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure the sensitivity curves of all KV heads; the mean over the texts.

    The loss is the KL from the full cache, not a change of the text's own likelihood: it is zero where nothing is lost
    and never below, every position tells, and so a short text is enough. It is taken where the block is continued, and
    where the model is asked to repeat the block, since heads that only recall needs show there alone; mean over the
    tokens of each, and the sum of the two.

    Args:
        texts: of each, the beginning is used.
        block_tokens: that are compacted; a pass over a little more is made for each head and ratio.
        on_progress: called with (passes made, passes to make).

    Raises:
        InvalidInput: there is no text, or one is too short.
        UnsupportedOperation: heads cannot differ in this engine's caches.
    """
    if not isinstance(engine.new_cache(), KVCache):
        raise UnsupportedOperation(
            "a calibration compacts one head alone, and this engine's heads share every cell: use engine='transformers'"
        )
    if not texts or block_tokens < MIN_BLOCK_TOKENS:
        raise InvalidInput(
            f"{len(texts)} texts with blocks of {block_tokens} tokens; give at least one text, and blocks of at least "
            f"{MIN_BLOCK_TOKENS} tokens"
        )
    needed = SINK_TOKENS + block_tokens + CONTINUATION_TOKENS
    tokens = [engine.encode(text, add_special=True)[:needed] for text in texts]
    for number, ids in enumerate(tokens, 1):
        if len(ids) < needed:
            raise InvalidInput(
                f"text {number} has {len(ids)} tokens; a block of {block_tokens} takes {needed}: give a longer text, "
                "or smaller blocks"
            )
    passages = [Passage.read(engine, ids) for ids in tokens]
    counts = [max(round(ratio * block_tokens), 1) for ratio in RATIOS]
    trials = [(passage, count) for passage in passages for count in counts]
    losses = torch.zeros(len(RATIOS), passages[0].cache.num_heads)
    for number, (passage, count) in enumerate(trials):
        for head, loss in enumerate(passage.losses(count)):
            losses[number % len(counts), head] += loss / len(texts)
            on_progress(number * losses.shape[1] + head + 1, len(trials) * losses.shape[1])
    return Calibration(
        fingerprint=engine.info.fingerprint,
        model=Path(engine.info.name).name,
        ratios=tuple(count / block_tokens for count in counts),
        losses=tuple(tuple(float(f"{loss:.3g}") for loss in head) for head in losses.T.tolist()),
    )


@dataclass(frozen=True)
class Passage:
    """A text whose block is compacted for one head after another.

    Attributes:
        cache: holds the text up to the end of the block.
        whole: its state.
        block, continuation: tokens.
        heads: of each compactable layer.
        full: log probabilities where nothing is compacted, (tokens of the continuation and the block, vocab_size).
    """

    engine: Engine
    cache: KVCache
    whole: CacheState
    block: list[int]
    continuation: list[int]
    heads: list[list[Head]]
    full: Tensor

    @classmethod
    def read(cls, engine: Engine, ids: list[int]) -> Passage:
        """From a text's tokens: pinned ones, the block, the continuation."""
        cache = engine.new_cache()
        assert isinstance(cache, KVCache)
        end = len(ids) - CONTINUATION_TOKENS
        engine.forward(cache, ids[:end])
        segment, block = Segment(SINK_TOKENS, end, 0), ids[SINK_TOKENS:end]
        queries = repeat_queries(engine, cache, block, chunk_tokens=len(block), on_progress=lambda done, total: None)
        heads = [
            _heads(index, *each, segment) for index, each in enumerate(zip(cache.compactable, queries, strict=True))
        ]
        passage = cls(engine, cache, cache.state(), block, ids[end:], heads, torch.empty(0))
        return replace(passage, full=passage.log_probabilities(passage.whole))

    def log_probabilities(self, state: CacheState) -> Tensor:
        """What is expected after each token of the continuation, and for each of the block's when it is repeated."""
        probe = [*self.continuation, *repeat_request(self.engine), *self.block]
        try:
            self.cache.restore(state)
            rows = self.engine.forward(self.cache, probe, num_logits=len(probe))
        finally:
            self.cache.restore(self.whole)
        return torch.cat([rows[: len(self.continuation)], rows[-len(self.block) - 1 : -1]]).log_softmax(-1)

    def losses(self, num_slots: int) -> Iterator[float]:
        """What is lost where one head has so many slots, head after head, in nats per token."""
        plan = Plan((Segment(SINK_TOKENS, SINK_TOKENS + len(self.block), num_slots),))
        every = [head for heads in self.heads for head in heads]
        slots = fit_all(every, plan, MemoryPolicy(), lambda stage, done, total: None).slots
        for heads in self.heads:
            for index, head in enumerate(heads):
                rows = self.log_probabilities(self._with(head.layer, index, slots[head]))
                kl = torch.nn.functional.kl_div(rows, self.full, reduction="none", log_target=True).sum(dim=-1)
                num_continued = len(self.continuation)
                yield max(float(kl[:num_continued].mean() + kl[num_continued:].mean()), 0.0)

    def _with(self, layer_index: int, head_index: int, slots: Slots) -> CacheState:
        """The state in which one head of one layer has slots in place of the block, and all else is exact."""
        layer = self.cache.compactable[layer_index]
        state = layer.state()
        assert state.buffer is not None
        everything = Slots.exact(*layer.exact_entries(0, state.length), start=0)
        heads = [everything.head(index) for index in range(everything.num_heads)]
        pinned = heads[head_index].where(heads[head_index].positions < SINK_TOKENS)
        heads[head_index] = Slots.concat([pinned, slots])
        tail = TailBuffer(state.buffer.key[:, :, :0], state.buffer.value[:, :, :0])
        compacted = TailState(Slots.stack(heads), tail, state.length, 0)
        layers = tuple(
            compacted if each is layer else other
            for each, other in zip(self.cache.layers, self.whole.layers, strict=True)
        )
        return replace(self.whole, layers=layers)


def _heads(index: int, layer: CompactableLayer, queries: ReferenceQueries, segment: Segment) -> list[Head]:
    """The heads of one layer, each of which gets its first slots first."""
    held = Entries.of(layer, segment)
    block = held.block(layer, queries)
    exact, ranks = exact_attention(block), torch.arange(segment.num_tokens)
    return [
        Head(index, block.head(head), exact.head(head), held.positions[head], ranks, layer.rotations)
        for head in range(block.num_heads)
    ]
