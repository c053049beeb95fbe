"""Multi-head latent attention: the cache holds latents, as one wide head whose keys are wider than its values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inside import cache_of
from random_operations import KINDS, POLICY, Driver
from test_families import LATENTS, Family, tokens
from transformers import PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.latents import LatentHeads

FAMILY = Family("DeepseekV3", LATENTS)
CHANGES = [{"originals": "host"}, {"segment_dtype": "int8", "ahead_tokens": 15}]


@pytest.fixture(scope="module")
def engine(byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    return TransformersEngine(FAMILY.build(), byte_tokenizer)


def test_the_cache_holds_one_head_of_latents(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, tokens())
    key, value = cache.compactable[0].tail
    rank, rotated = LATENTS["kv_lora_rank"], LATENTS["qk_rope_head_dim"]
    assert (*key.shape[1::2], *value.shape[1::2]) == (1, rotated + rank, 1, rank)
    assert torch.equal(key[..., rotated:], value)
    assert cache.exact_nbytes == len(cache.compactable) * len(tokens()) * (rotated + 2 * rank) * 4


def test_only_the_part_with_rope_is_rotated(engine: TransformersEngine) -> None:
    """The rotated part of a key stands first, and its halves are pairs."""
    assert engine.capabilities.can_rotate_keys
    rotation = engine.new_cache().compactable[0].rotation
    assert sorted([*rotation.first.tolist(), *rotation.second.tolist()]) == list(range(LATENTS["qk_rope_head_dim"]))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_random_operations(engine: TransformersEngine, tmp_path: Path, changes: dict[str, object]) -> None:
    """Appends, answers, rewinds, forks, recalls and saved sessions: all as their rebuild has it, to the bit."""
    driver = Driver(engine, POLICY.with_changes(**changes), "latents", str(tmp_path), kinds=tuple(KINDS))
    for _ in range(2):
        for _ in range(3):
            driver.step()
        assert driver.differences() == [], driver.done


def test_a_quarter_kept_is_nearer_than_eviction(engine: TransformersEngine) -> None:
    """Eviction keeps the same keys, without biases and with the values as they were."""
    ids = tokens()
    session = Memory(engine, MemoryPolicy(trigger_tokens=1.0, keep_ratio=0.25, pinned=2)).session()
    session.append(ids[:50])
    session.compact(1.0)
    fitted, whole = cache_of(session), engine.new_cache()
    num_tokens = fitted.num_tokens
    engine.forward(whole, ids[:num_tokens])
    evicted = fitted.fork()
    for layer, original in zip(evicted.compactable, whole.compactable, strict=True):
        value = original.tail[1][0, 0, layer.slots.positions.long()]
        layer.slots = replace(layer.slots, value=value, bias=torch.zeros_like(layer.slots.bias))
    expected, near, far = (
        engine.forward(cache, ids[num_tokens:], num_logits=len(ids) - num_tokens) for cache in (whole, fitted, evicted)
    )
    assert (near - expected).square().mean() < (far - expected).square().mean()


def test_query_maps_and_search_read_latents(engine: TransformersEngine) -> None:
    policy = POLICY.with_changes(originals="host", reference_queries=("predicted",))
    session = Memory(engine, policy).session()
    session.append(tokens())
    session.compact(1.0)
    assert cache_of(session).segments
    assert session.logits(tokens()[:5]).isfinite().all()
    assert session.search("abc", top=1)


def test_maps_of_weights_that_cannot_be_read_are_measured() -> None:
    """Quantised weights and adapters stand in modules of other classes."""

    class Linear(torch.nn.Linear):
        pass

    module = FAMILY.build().model.layers[0].self_attn
    query = torch.randn(1, 4, 3, 16)
    read = LatentHeads(module).queries(query)
    module.kv_b_proj.__class__ = Linear
    torch.testing.assert_close(LatentHeads(module).queries(query), read)


def test_several_caches_read_a_token_each(engine: TransformersEngine) -> None:
    """The batch hands out latents too, and is read by the queries of all heads."""
    ids = tokens()
    caches, alone = [engine.new_cache(), engine.new_cache()], [engine.new_cache(), engine.new_cache()]
    for one, other, length in zip(caches, alone, (20, 30), strict=True):
        engine.forward(one, ids[:length])
        engine.forward(other, ids[:length])
    together = engine.forward_batch(caches, [ids[20], ids[30]], [None, None])
    apart = [engine.forward(cache, [ids[length]], num_logits=1) for cache, length in zip(alone, (20, 30), strict=True)]
    assert together is not None
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
