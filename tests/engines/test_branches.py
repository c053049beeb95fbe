"""Several texts behind one cache: each expects what it would expect if it were read there alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from inside import cache_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.abilities import Branching
from am_memory.engines.partwise import plain_partial_attention
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.kv_cache.cache import KVCache
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy

PAST = list(range(30, 130))
TEXTS = [[40, 41, 42, 43, 44], [99], [7, 8, 9], [60, 61]]
NEXT = [[50, 51, 52], [120, 121, 122], [10, 11, 12], [62, 63, 64]]


def alone(engine: TransformersEngine, cache: KVCache, texts: Sequence[Sequence[int]]) -> Tensor:
    """(num_texts, vocab_size): what the model expects after each, read behind a copy of the cache."""
    return torch.cat([engine.forward(cache.fork(), text, num_logits=1) for text in texts])


def compacted_cache(engine: TransformersEngine, **options: object) -> KVCache:
    """Some of it in slots, whose numbers differ from head to head."""
    policy = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", keep_recent=0, keep_ratio=0.3, **options)
    session = Memory(engine, policy=policy).scratch()
    session.append(PAST)
    session.compact(0.5)
    cache = cache_of(session)
    assert isinstance(cache, KVCache)
    return cache


@pytest.fixture(params=["exact", "compact", "int8"])
def cache(request: pytest.FixtureRequest, engine: TransformersEngine) -> KVCache:
    if request.param == "exact":
        cache = engine.new_cache()
        engine.forward(cache, PAST)
        return cache
    return compacted_cache(engine, segment_dtype="int8" if request.param == "int8" else "model")


def test_each_text_expects_what_it_expects_alone(engine: TransformersEngine, cache: KVCache) -> None:
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    torch.testing.assert_close(branches.logits, alone(engine, cache, TEXTS))
    for step in range(3):
        branches.advance(range(4), [new[step] for new in NEXT])
        texts = [[*text, *new[: step + 1]] for text, new in zip(TEXTS, NEXT, strict=True)]
        torch.testing.assert_close(branches.logits, alone(engine, cache, texts), rtol=1e-4, atol=1e-4)


def test_plain_operations_give_the_same(
    engine: TransformersEngine, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of devices that no kernel is for."""
    for name in ("branches", "partwise"):
        monkeypatch.setattr(f"am_memory.engines.{name}.partial_attention", plain_partial_attention)
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    branches.advance([0, 1, 3], [50, 120, 62])
    texts = [[*TEXTS[0], 50], [*TEXTS[1], 120], [*TEXTS[3], 62]]
    torch.testing.assert_close(branches.logits, alone(engine, cache, texts), rtol=1e-4, atol=1e-4)


def test_texts_that_have_ended_are_gone(engine: TransformersEngine, cache: KVCache) -> None:
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    branches.advance([0, 2, 3], [50, 10, 62])
    branches.advance([1, 2], [11, 63])
    texts = [[*TEXTS[2], 10, 11], [*TEXTS[3], 62, 63]]
    torch.testing.assert_close(branches.logits, alone(engine, cache, texts), rtol=1e-4, atol=1e-4)


def test_the_cache_stays_as_it_is(engine: TransformersEngine, cache: KVCache) -> None:
    before, tail = cache.state(), [layer.tail[0].clone() for layer in cache.compactable]
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    branches.advance(range(4), [new[0] for new in NEXT])
    assert cache.state() == before
    assert all(torch.equal(layer.tail[0], key) for layer, key in zip(cache.compactable, tail, strict=True))


def test_what_is_read_into_the_cache_later_is_not_seen(engine: TransformersEngine, cache: KVCache) -> None:
    texts = [[*text, new[0]] for text, new in zip(TEXTS, NEXT, strict=True)]
    expected = alone(engine, cache, texts)
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    engine.forward(cache, [5, 6, 7])
    branches.advance(range(4), [new[0] for new in NEXT])
    torch.testing.assert_close(branches.logits, expected, rtol=1e-4, atol=1e-4)


def test_they_may_begin_behind_nothing(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    branches = engine.branches(cache, TEXTS)
    assert branches is not None
    branches.advance([1, 3], [120, 62])
    expected = alone(engine, cache, [[*TEXTS[1], 120], [*TEXTS[3], 62]])
    torch.testing.assert_close(branches.logits, expected, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_holds_one_text(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer)
    assert isinstance(engine, Branching)
    assert engine.branches(engine.new_cache(), TEXTS) is None


def test_another_engines_cache_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="new_cache"):
        engine.branches(object(), TEXTS)  # type: ignore[arg-type]
