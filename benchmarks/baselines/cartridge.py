"""A compact cache that is trained by gradient descent on the model's own conversations (Cartridges, arXiv:2506.06266).

Keys (after RoPE) and values of as many slots for every KV head are the only parameters; what is pinned, what came after
the block and the model are frozen. They begin as the entries of the block's first tokens, as in the paper, and Adam
brings what the model then expects at every token of the conversations to what it expects with the full cache (context
distillation). The conversations are those that a compaction here can be fitted on: the model's answers to the prompts
of self-study, and the block repeated in pieces. In the paper there are thousands of them, on many GPUs; here a few,
each read again and again, one in a step.

Knows nothing of how the outcome is judged. `benchmarks/pareto.py --cartridge-seconds` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import fmean

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache

from am_memory import Session
from am_memory.compaction.plan import plan_segment, segment_ends
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.support import cache_argument
from am_memory.errors import UnsupportedOperation
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.queries import scratch
from am_memory.queries.repeat_prefill import repeat_request
from am_memory.queries.self_study import self_study

LEARNING_RATE = 2e-2
REPEATED_TOKENS = 256
"""Tokens of the block that one conversation repeats."""


@dataclass(frozen=True)
class Conversation:
    """The tokens of one training step, and the distributions of the model with the full cache after each of them.

    Attributes:
        token_ids: they follow what the cache holds.
        expected: (num_tokens, vocab_size) float32, log probabilities.
    """

    token_ids: tuple[int, ...]
    expected: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """How far the training has come.

    Attributes:
        session: with the trained entries in the block's place.
        seconds: so far, all in all.
        writing_seconds: of these, to write the conversations and to read what the full cache expects in them.
        steps: each a conversation.
        kl_training: mean KL(full cache || trained) in the last step on each conversation; None before the first step.
    """

    session: Session
    seconds: float
    writing_seconds: float
    steps: int
    kl_training: float | None


def trained(session: Session, fraction: float, checkpoints: Sequence[float]) -> Iterator[Checkpoint]:
    """Train what `session.compact(fraction)` would compact, in as many slots; the clock stands between checkpoints.

    Args:
        session: not compacted yet; it is afterwards as it was.
        checkpoints: seconds, ascending. A checkpoint comes with the first step that ends after it, and at the earliest
            when the conversations are written.

    Raises:
        UnsupportedOperation: a session that was compacted, or a model or engine whose caches cannot be trained.
    """
    cartridge = Cartridge(session, fraction)
    started = time.perf_counter()
    conversations = cartridge.conversations()
    seconds = writing_seconds = time.perf_counter() - started
    losses: list[float] = []
    remaining = cycle(conversations)
    for limit in checkpoints:
        while seconds < limit:
            started = time.perf_counter()
            losses.append(cartridge.step(next(remaining)))
            seconds += time.perf_counter() - started
        last = losses[-len(conversations) :]
        yield Checkpoint(cartridge.swapped_in(), seconds, writing_seconds, len(losses), fmean(last) if last else None)


class Cartridge:
    """Trained keys and values in the place of a block of exact entries.

    Attributes:
        block: the tokens they stand for, and their number over all heads.
        key, value: of each layer, (num_key_value_heads, num_slots, head_dim) float32.
    """

    def __init__(self, session: Session, fraction: float) -> None:
        self._session = session
        self._engine, self._cache = trainable(session)
        self.block = equal_block(session, fraction)
        num_slots = self.block.num_slots // self._cache.num_heads
        first = [
            layer.exact_entries(self.block.start, self.block.start + num_slots) for layer in self._cache.compactable
        ]
        self.key, self.value = (
            [entries.float().clone().requires_grad_() for entries in each] for each in zip(*first, strict=True)
        )
        self._optimizer = torch.optim.Adam([*self.key, *self.value], lr=LEARNING_RATE)

    def conversations(self) -> list[Conversation]:
        """The answers of self-study, and the block in pieces, each behind the request to repeat it."""
        studied = self_study(
            self._engine,
            self._cache,
            max_tokens=self._session._context.policy.self_study_tokens,
            on_progress=lambda done, total: None,
        )
        request = repeat_request(self._engine)
        starts = range(self.block.start, self.block.end, REPEATED_TOKENS)
        tokens = self._session.tokens[: self.block.end]
        repeated = [(*request, *tokens[start : start + REPEATED_TOKENS]) for start in starts]
        return [Conversation(token_ids, self._full_cache_expects(token_ids)) for token_ids in (*studied, *repeated)]

    def _full_cache_expects(self, token_ids: Sequence[int]) -> Tensor:
        with scratch(self._cache):
            return self._engine.forward(self._cache, token_ids, num_logits=len(token_ids)).log_softmax(-1)

    def step(self, conversation: Conversation) -> float:
        """One step of Adam on a conversation; the mean KL of its tokens before it."""
        self._optimizer.zero_grad()
        loss = self.loss(conversation)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def loss(self, conversation: Conversation) -> Tensor:
        """Mean over tokens of KL(full cache || trained)."""
        model, start = self._engine.model, self._cache.num_tokens
        ids = torch.tensor([conversation.token_ids], device=model.device)
        positions = torch.arange(start, start + ids.shape[1], device=model.device)[None]
        output = model(input_ids=ids, position_ids=positions, use_cache=True, **{cache_argument(model): self._prefix()})
        logits = output.logits[0, :, : self._engine.info.vocab_size].float()
        return kl_div(logits.log_softmax(-1), conversation.expected, reduction="batchmean", log_target=True)

    def _prefix(self) -> DynamicCache:
        """The pinned entries, the trained ones and the entries after the block; only the trained ones get gradients."""
        prefix, block = DynamicCache(), self.block
        for index, layer in enumerate(self._cache.compactable):
            before = layer.exact_entries(0, block.start)
            after = layer.exact_entries(block.end, self._cache.num_tokens)
            entries = (
                torch.cat([first, each[index].to(first.dtype), last], dim=1)[None]
                for first, each, last in zip(before, (self.key, self.value), after, strict=True)
            )
            prefix.update(*entries, index)
        return prefix

    def swapped_in(self) -> Session:
        """A branch of the session with the trained entries, as they are now, in the block's place."""
        branch, dtype = self._session.fork(), self._engine.model.dtype
        slots = [
            Slots.recalled(key.detach().to(dtype), value.detach().to(dtype), self.block.start)
            for key, value in zip(self.key, self.value, strict=True)
        ]
        cache = branch._context.cache
        cache.restore(cache.compacted([self.block], slots, num_pinned=self.block.start))
        return branch


def trainable(session: Session) -> tuple[TransformersEngine, KVCache]:
    """The session's engine, with the model frozen, and its cache; all of it must be exact."""
    engine, cache = session.engine, session._context.cache
    if not isinstance(engine, TransformersEngine) or not isinstance(cache, KVCache):
        raise UnsupportedOperation(f"a {type(cache).__name__} has no gradients: use engine='transformers'")
    if len(cache.compactable) < len(cache.layers):
        raise UnsupportedOperation(
            f"{len(cache.layers) - len(cache.compactable)} of {len(cache.layers)} layers have a sliding window, which "
            "is not trained here: use a model with full attention only"
        )
    if cache.segments:
        raise UnsupportedOperation(
            f"session {session.name!r} has {len(cache.segments)} compact segments: train from one that has none"
        )
    engine.model.requires_grad_(False)
    return engine, cache


def equal_block(session: Session, fraction: float) -> Segment:
    """What `session.compact(fraction)` would compact, as one segment, with the same number of slots for every head."""
    context = session._context
    *_, end = segment_ends(context.policy, context.sizes, fraction)
    newest = plan_segment(context.policy, context.sizes, context.trigger_tokens, [end]).newest
    num_heads = context.cache.num_heads
    return replace(newest, num_slots=round(newest.num_slots / num_heads) * num_heads)
