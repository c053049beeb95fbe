"""The repeat pass: on scratch, chunk by chunk, with what each query saw."""

from __future__ import annotations

import pytest
import torch
from inside import cache_of

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.queries import repeat_queries
from am_memory.queries.repeat_prefill import REQUEST, repeat_request

TOKENS = list(range(30, 130))


def ignore(done: int, total: int) -> None:
    pass


def test_the_request_is_a_turn_of_its_own(engine: TransformersEngine) -> None:
    text = engine.decode(repeat_request(engine))
    assert text == f"<|im_end|>\n<|im_start|>user\n{REQUEST}<|im_end|>\n<|im_start|>assistant\n"


def test_the_cache_is_afterwards_as_it_was(engine: TransformersEngine) -> None:
    session = Memory(engine, MemoryPolicy(trigger_tokens=1000)).session()
    session.append(TOKENS)
    before, stats = session.logits([1, 2, 3]), session.stats
    repeat_queries(engine, cache_of(session), TOKENS[:40], chunk_tokens=16, on_progress=ignore)
    assert torch.equal(session.logits([1, 2, 3]), before)
    assert session.stats.logical_tokens == stats.logical_tokens


def test_there_is_a_query_for_each_token_and_group_member(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, TOKENS)
    samples = repeat_queries(engine, cache, TOKENS[:40], chunk_tokens=16, on_progress=ignore)
    assert [tuple(sample.query.shape) for sample in samples] == [(2, 2 * 40, 16)] * 3
    assert [tuple(sample.log_mass.shape) for sample in samples] == [(2, 2 * 40)] * 3


def test_chunks_do_not_matter(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, TOKENS)
    one = repeat_queries(engine, cache, TOKENS[:40], chunk_tokens=100, on_progress=ignore)
    many = repeat_queries(engine, cache, TOKENS[:40], chunk_tokens=7, on_progress=ignore)
    for first, second in zip(one, many, strict=True):
        # Chunks come one after the other within each member of a group, so the order is the same.
        torch.testing.assert_close(first.query, second.query, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first.log_mass, second.log_mass, atol=1e-4, rtol=1e-4)


def test_the_mass_is_that_of_everything_a_query_sees(engine: TransformersEngine) -> None:
    """The share of a block in it is below 1, and all blocks together with the repeated tokens make 1."""
    cache = engine.new_cache()
    engine.forward(cache, TOKENS)
    sample = repeat_queries(engine, cache, TOKENS[:40], chunk_tokens=100, on_progress=ignore)[0]
    layer = cache.compactable[0]
    key, _ = layer.exact_entries(0, 100)
    mass = (sample.query @ key.mT * layer.scaling).logsumexp(dim=-1)
    assert (mass < sample.log_mass).all()
    assert (mass > sample.log_mass - 8).all()


def test_an_interrupt_in_the_pass_leaves_the_cache_as_it_was(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    engine.forward(cache, TOKENS)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repeat_queries(engine, cache, TOKENS[:40], chunk_tokens=16, on_progress=interrupt)
    assert cache.num_tokens == len(TOKENS)
    assert all(layer.query_sink is None for layer in cache.compactable)
