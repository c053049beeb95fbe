"""Layers that read the keys and values of an earlier one: one cache layer, the queries of all that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inside import cache_of
from random_operations import KINDS, POLICY, Driver
from test_families import GEMMA3N, GEMMA4, SHARED, Family, assert_same_logits, tokens
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.shared_layers import SKIP, num_readers
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.slots import Segment, Slots
from am_memory.queries.total_mass import total_log_mass

FAMILIES = {
    "Gemma 4": Family("Gemma4Text", {"sliding_window": 16, **GEMMA4, **SHARED}),
    "Gemma 3n": Family("Gemma3nText", {"sliding_window": 16, **GEMMA3N, **SHARED}),
}
CHANGES = [
    {"originals": "host"},
    {"segment_dtype": "int8", "ahead_tokens": 15},
    {"experiments": Experiments(on_policy=True)},
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def engine(family: Family, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    return TransformersEngine(family.build(), byte_tokenizer)


def queries_of(engine: TransformersEngine, cache: KVCache, ids: list[int], **options: Any) -> list[Any]:
    told: list[Any] = []
    engine.forward(cache, ids, on_query=lambda index, *queries: told.append((index, *queries)), **options)
    return told


def test_a_layer_is_read_by_those_of_its_type_without_keys(engine: TransformersEngine) -> None:
    """The last full layer with keys is layer 2, the last one with a window layer 3; three layers have no keys."""
    assert num_readers(engine.model.config) == [1, 1, 3, 2, 1, 1, 1]
    assert [layer.num_readers for layer in engine.new_cache().compactable] == [1, 3]


def test_the_sink_gets_the_queries_of_all_readers_at_once(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    told = queries_of(engine, cache, tokens()[:20])
    assert [index for index, *_ in told] == list(range(len(cache.compactable)))
    for layer, (_, query, log_mass) in zip(cache.compactable, told, strict=True):
        groups = 4 // layer.num_heads * layer.num_readers
        assert query.shape[:3] == log_mass.shape == (layer.num_heads, groups, 20)
    assert max(layer.num_readers for layer in cache.compactable) > 1


def test_the_mass_of_each_readers_queries_is_that_on_the_shared_keys(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, tokens()[:30])
    slots = [Slots.exact(*layer.exact_entries(2, 12), start=2) for layer in cache.compactable]
    cache.restore(cache.compacted([Segment(2, 12, 120)], slots, num_pinned=2))
    for layer, (_, query, log_mass) in zip(cache.compactable, queries_of(engine, cache, tokens()[30:31]), strict=True):
        actual = total_log_mass(layer, cache.num_tokens, query.flatten(1, 2))
        torch.testing.assert_close(actual, log_mass.flatten(1, 2), rtol=0, atol=1e-5)


def test_an_interrupted_pass_leaves_no_queries(engine: TransformersEngine) -> None:
    """Those of its first readers would be handed out with the next pass."""
    cache, ids = engine.new_cache(), tokens()
    hook = engine.model.model.layers[-2].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        queries_of(engine, cache, ids[:5])
    hook.remove()
    cache.reset()
    assert all(query.shape[2] == 7 for _, query, _ in queries_of(engine, cache, ids[:7]))


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("num_logits", [1, 3, 20])
def test_logits_of_some_tokens_are_those_of_all(engine: TransformersEngine, family: Family, num_logits: int) -> None:
    """Gemma 4 leaves the other tokens out of its last layers. Without a mask, these took the queries for those of the
    first tokens: with a short prompt, whose window hides nothing."""
    ids = tokens()
    with torch.no_grad():
        expected = family.build()(torch.tensor([ids]), use_cache=False).logits[0]
    for bounds in ([0, 10], [0, 30, 60]):
        cache = engine.new_cache()
        for start, end in zip(bounds, bounds[1:], strict=False):
            num = min(num_logits, end - start)
            assert_same_logits(engine.forward(cache, ids[start:end], num_logits=num), expected[end - num : end], 1e-4)


def test_tokens_without_logits_skip_the_layers_without_keys(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    last = engine.model.model.layers[-1]
    hook = last.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[-2]))
    cache = engine.new_cache()
    engine.forward(cache, tokens()[:20])
    queries_of(engine, cache, tokens()[20:30])
    hook.remove()
    assert lengths == [1 if hasattr(engine.model.model, SKIP) else 20, 10]


def test_generate_gives_the_tokens_of_the_stock_model(engine: TransformersEngine, family: Family) -> None:
    prompt = torch.tensor([tokens()[:40]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = family.build().generate(prompt, **options)
    cache = Memory(engine, MemoryPolicy(trigger_tokens=512)).cache()
    assert torch.equal(engine.model.generate(prompt, cache=cache, **options), expected)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_random_operations(engine: TransformersEngine, tmp_path: Path, changes: dict[str, object]) -> None:
    """Appends, answers, rewinds, forks, recalls and saved sessions: all as their rebuild has it, to the bit."""
    driver = Driver(engine, POLICY.with_changes(**changes), "shared", str(tmp_path), kinds=tuple(KINDS))
    for _ in range(2):
        for _ in range(3):
            driver.step()
        assert driver.differences() == [], driver.done


def test_query_maps_and_search_read_shared_layers(engine: TransformersEngine) -> None:
    """Search heads are counted layer by layer: a shared layer has more of them."""
    policy = POLICY.with_changes(originals="host", reference_queries=("predicted",))
    session = Memory(engine, policy).session()
    session.append(tokens())
    session.compact(1.0)
    assert cache_of(session).segments
    assert session.logits(tokens()[:5]).isfinite().all()
    assert session.search("abc", top=1)


def test_several_caches_read_a_token_each(engine: TransformersEngine) -> None:
    ids, told = tokens(), list[Tensor]()
    caches, alone = [engine.new_cache(), engine.new_cache()], [engine.new_cache(), engine.new_cache()]
    for one, other, length in zip(caches, alone, (20, 30), strict=True):
        engine.forward(one, ids[:length])
        engine.forward(other, ids[:length])
    keep = [lambda index, query, log_mass: told.append(query), None]
    together = engine.forward_batch(caches, [ids[20], ids[30]], keep)
    apart = [engine.forward(cache, [ids[length]], num_logits=1) for cache, length in zip(alone, (20, 30), strict=True)]
    assert together is not None
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)
    assert len(told) == len(caches[0].compactable)


def test_layers_that_share_a_cache_are_not_compiled(family: Family, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModel, match="share a cache.*compile=False"):
        TransformersEngine(family.build(), byte_tokenizer, compile=True)


def test_a_model_that_shares_otherwise_is_refused(
    family: Family, byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queries of a reader that is not known would be missing from every fit."""
    wrong = "am_memory.engines.transformers.support.num_readers"
    monkeypatch.setattr(wrong, lambda config: [1] * config.num_hidden_layers)
    with pytest.raises(UnsupportedModel, match="as often as its configuration says"):
        TransformersEngine(family.build(), byte_tokenizer)
