"""How much a model needs each of its KV heads: the loss when the entries of one head alone are compacted.

    a block in the cache  ->  fits of every head at every ratio  ->  a pass for each of them  ->  KL from the full cache

Measured once for each model (arXiv:2602.16284, head budgets). `am_memory/budgets/calibrated.py` uses the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from am_memory.budgets import Calibration
from am_memory.compaction.head_fits import fit_all
from am_memory.compaction.plan import Plan
from am_memory.compaction.scoring import LayerEntries, ScoredHead, ScoredLayer
from am_memory.engines.base import Engine, SessionCache
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import TailBuffer, TailState
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.policy import SINK_TOKENS, MemoryPolicy
from am_memory.queries import repeat_queries, scratch
from am_memory.queries.repeat_prefill import repeat_request

RATIOS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Slots for each key of the block; a head gets at least one slot."""
CONTINUATION_TOKENS = 64
"""Tokens that are read behind the block."""
MIN_BLOCK_TOKENS = 100
"""In a smaller block two ratios would be the same number of slots."""


def calibrate(
    engine: Engine,
    texts: Sequence[str],
    *,
    block_tokens: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Measure the sensitivity curves of all KV heads, as the mean over the texts.

    The loss is the KL divergence from the full cache, in nats per token. Unlike the text's likelihood it is zero if
    nothing is lost and never negative, and every position counts, so a short text is enough. It is measured where the
    text continues, and where the model repeats the block: some heads are only needed for recall. The two means over
    tokens are added.

    Args:
        texts: only the beginning of each is used.
        block_tokens: tokens of the block that is compacted. Each head and ratio takes a pass over a little more.
        on_progress: called with (passes done, passes in all).

    Raises:
        InvalidInput: there is no text, or one is too short.
        UnsupportedOperation: the engine's heads cannot differ in their slots.
    """
    if not engine.capabilities.has_ragged_heads:
        raise UnsupportedOperation(
            "a calibration compacts one head alone, and this engine's heads share every cell: use ragged heads"
        )
    if not texts or block_tokens < MIN_BLOCK_TOKENS:
        raise InvalidInput(
            f"{len(texts)} texts with blocks of {block_tokens} tokens; give at least one text, and blocks of at least "
            f"{MIN_BLOCK_TOKENS} tokens"
        )
    needed = SINK_TOKENS + block_tokens + CONTINUATION_TOKENS
    tokens = [engine.encode(text, add_special=True)[:needed] for text in texts]
    for number, token_ids in enumerate(tokens, 1):
        if len(token_ids) < needed:
            raise InvalidInput(
                f"text {number} has {len(token_ids)} tokens; a block of {block_tokens} takes {needed}: give a longer "
                "text, or smaller blocks"
            )
    probes = [Probe.read(engine, token_ids) for token_ids in tokens]
    counts = [max(round(ratio * block_tokens), 1) for ratio in RATIOS]
    trials = [(probe, count) for probe in probes for count in counts]
    losses = torch.zeros(len(RATIOS), probes[0].cache.num_heads)
    for number, (probe, count) in enumerate(trials):
        for head, loss in enumerate(probe.losses(count)):
            losses[number % len(counts), head] += loss / len(texts)
            on_progress(number * losses.shape[1] + head + 1, len(trials) * losses.shape[1])
    return Calibration(
        fingerprint=engine.info.fingerprint,
        model=Path(engine.info.name).name,
        ratios=tuple(count / block_tokens for count in counts),
        losses=tuple(tuple(float(f"{loss:.3g}") for loss in head) for head in losses.T.tolist()),
    )


@dataclass(frozen=True)
class Probe:
    """A text in the cache, whose block is compacted for one head at a time.

    Attributes:
        cache: holds the text up to the end of the block.
        full_state: the state of the cache with nothing compacted.
        block, continuation: token ids.
        heads: one list for each compactable layer.
        full: log probabilities with nothing compacted, (len(continuation) + len(block), vocab_size) float32.
    """

    engine: Engine
    cache: SessionCache
    full_state: Snapshot
    block: list[int]
    continuation: list[int]
    heads: list[list[ScoredHead]]
    full: Tensor

    @classmethod
    def read(cls, engine: Engine, token_ids: list[int]) -> Probe:
        """Read a text's tokens: pinned ones, the block, the continuation."""
        cache = engine.new_cache()
        end = len(token_ids) - CONTINUATION_TOKENS
        engine.forward(cache, token_ids[:end])
        segment, block = Segment(SINK_TOKENS, end, 0), token_ids[SINK_TOKENS:end]
        queries = repeat_queries(engine, cache, block, chunk_tokens=len(block), on_progress=lambda done, total: None)
        ranks = torch.arange(segment.num_tokens)  # a head's slots in the order of their importance
        heads = []
        for index, (layer, sample) in enumerate(zip(cache.compactable, queries, strict=True)):
            scored = ScoredLayer.of(index, layer, LayerEntries.read(layer, segment), sample)
            heads.append(scored.heads(ranks.expand(scored.block.num_heads, -1)))
        probe = cls(engine, cache, cache.state(), block, token_ids[end:], heads, torch.empty(0))
        return replace(probe, full=probe.log_probabilities(probe.full_state))

    def log_probabilities(self, state: Snapshot) -> Tensor:
        """Log probabilities after each token of the continuation, and of each token of the repeated block.

        Returns:
            (len(continuation) + len(block), vocab_size) float32.
        """
        tokens = [*self.continuation, *repeat_request(self.engine), *self.block]
        with scratch(self.cache):
            self.cache.restore(state)
            rows = self.engine.forward(self.cache, tokens, num_logits=len(tokens))
        return torch.cat([rows[: len(self.continuation)], rows[-len(self.block) - 1 : -1]]).log_softmax(-1)

    def losses(self, num_slots: int) -> Iterator[float]:
        """The loss if one head alone has `num_slots` slots, head after head, in nats per token."""
        plan = Plan((Segment(SINK_TOKENS, SINK_TOKENS + len(self.block), num_slots),))
        all_heads = [head for heads in self.heads for head in heads]
        slots = fit_all(all_heads, plan, MemoryPolicy(), lambda stage, done, total: None).slots
        for heads in self.heads:
            for index, head in enumerate(heads):
                rows = self.log_probabilities(self._compacted(head.layer, index, slots[head]))
                kl = torch.nn.functional.kl_div(rows, self.full, reduction="none", log_target=True).sum(dim=-1)
                num_continued = len(self.continuation)
                yield max(float(kl[:num_continued].mean() + kl[num_continued:].mean()), 0.0)

    def _compacted(self, layer_index: int, head_index: int, slots: Slots) -> CacheState:
        """The state in which one head of one layer has slots in place of the block; all else is exact."""
        layer, layers = self.cache.compactable[layer_index], list(self.full_state.layers)
        where = [index for index, state in enumerate(layers) if isinstance(state, TailState)][layer_index]
        state = layers[where]
        assert isinstance(state, TailState)
        assert state.buffer is not None
        everything = Slots.exact(*layer.exact_entries(0, state.length), start=0)
        heads = [everything.head(index) for index in range(everything.num_heads)]
        pinned = heads[head_index].where(heads[head_index].positions < SINK_TOKENS)
        heads[head_index] = Slots.concat([pinned, slots])
        tail = TailBuffer(state.buffer.key[:, :, :0], state.buffer.value[:, :, :0])
        layers[where] = TailState(Slots.stack(heads), tail, state.length, 0)
        return CacheState(tuple(layers), self.full_state.segments, self.full_state.num_pinned_slots)
