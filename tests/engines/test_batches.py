"""Several caches that read a token each in one pass: each expects what it expects alone, whatever the others hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from inside import cache_of
from test_families import FAMILIES, Family, identity
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.kv_cache.cache import KVCache

TOKENS = torch.randint(0, 256, (3, 80), generator=torch.Generator().manual_seed(7)).tolist()
NO_SINKS = (None, None, None)


def caches_of(engine: TransformersEngine, **options: object) -> list[KVCache]:
    """One with slots whose numbers differ from head to head, a short one, and one beyond the windows."""
    policy = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", keep_recent=0, keep_ratio=0.3, **options)
    session = Memory(engine, policy=policy).scratch()
    session.append(TOKENS[0][:60])
    session.compact(0.6)
    others = [engine.new_cache(), engine.new_cache()]
    for cache, ids in zip(others, (TOKENS[1][:5], TOKENS[2][:41]), strict=True):
        engine.forward(cache, ids)
    return [cache_of(session), *others]


def alone(engine: TransformersEngine, caches: Sequence[KVCache], token_ids: Sequence[int]) -> Tensor:
    """Logits of each token, read into its own cache."""
    return torch.cat(
        [engine.forward(cache, [token], num_logits=1) for cache, token in zip(caches, token_ids, strict=True)]
    )


@pytest.mark.parametrize("family", FAMILIES, ids=identity)
def test_each_cache_expects_what_it_expects_alone(family: Family, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    engine = TransformersEngine(family.build(), byte_tokenizer)
    caches = caches_of(engine)
    twins = [cache.fork() for cache in caches]
    for step in range(3):
        token_ids = [row[60 + step] for row in TOKENS]
        logits = engine.forward_batch(caches, token_ids, NO_SINKS)
        if family.name == "Llama4Text":
            assert logits is None  # chunks
            return
        expected = alone(engine, twins, token_ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=10 * family.tolerance)
    for cache, twin in zip(caches, twins, strict=True):
        assert cache.num_tokens == twin.num_tokens
        assert cache.nbytes == twin.nbytes
