"""Several caches that read a token each in one pass of llama.cpp: each expects what it expects alone."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from inside import cache_of
from policies import plain_policy
from torch import Tensor

from am_memory import Generation, Memory
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp.batch_kernel import BatchKernel
from am_memory.engines.llama_cpp.pool import Pool
from am_memory.engines.llama_cpp.seats import SPARE_SEAT_TOKENS
from am_memory.kv_cache.cache import KVCache

POLICY = plain_policy(trigger_tokens=300, keep_ratio=0.25, pinned=4, keep_recent=8)
TEXT = "An owl is a bird that hunts at night, and sleeps by day. It hears a mouse under the snow, and flies without a sound. "


def cache_with(llama: LlamaCppEngine, num_tokens: int, fraction: float = 0.0, **changes: object) -> KVCache:
    """The last tokens of the text, a fraction of them compacted."""
    session = Memory(llama, POLICY.with_changes(**changes)).session()
    session.append((TEXT * 3)[-num_tokens:])
    if fraction:
        session.compact(fraction)
    return cache_of(session)


def unequal(llama: LlamaCppEngine) -> list[KVCache]:
    """Caches with and without slots, in numbers that differ."""
    return [cache_with(llama, 100, 0.5), cache_with(llama, 7), cache_with(llama, 200, 0.9, segment_dtype="int8")]


def tokens_at(step: int, num_caches: int) -> list[int]:
    return [(40 + 7 * step + 3 * row) % 250 for row in range(num_caches)]


def alone(llama: LlamaCppEngine, caches: Sequence[KVCache], token_ids: Sequence[int]) -> Tensor:
    return torch.cat(
        [llama.forward(cache, [token], num_logits=1) for cache, token in zip(caches, token_ids, strict=True)]
    )


def together(llama: LlamaCppEngine, caches: Sequence[KVCache], token_ids: Sequence[int]) -> Tensor:
    logits = llama.forward_batch(caches, token_ids, [None] * len(caches))
    assert logits is not None
    return logits


def assert_same_steps(llama: LlamaCppEngine, caches: Sequence[KVCache], twins: Sequence[KVCache], steps: range) -> None:
    """Read tokens into caches together, and into their twins alone."""
    for step in steps:
        token_ids = tokens_at(step, len(caches))
        expected = alone(llama, twins, token_ids)
        torch.testing.assert_close(together(llama, caches, token_ids), expected, atol=1e-3, rtol=1e-3)
    assert [cache.num_tokens for cache in caches] == [twin.num_tokens for twin in twins]


@pytest.mark.parametrize("slots", [True, False])
def test_each_cache_expects_what_it_expects_alone(llama: LlamaCppEngine, slots: bool) -> None:
    caches = unequal(llama) if slots else [cache_with(llama, 90), cache_with(llama, 5)]
    assert_same_steps(llama, caches, [cache.fork() for cache in caches], range(SPARE_SEAT_TOKENS + 9))


def test_caches_come_and_go(llama: LlamaCppEngine) -> None:
    """Those that stay are moved together, and whoever left holds what it held."""
    caches = [*unequal(llama), cache_with(llama, 30), cache_with(llama, 50)]
    twins = [cache.fork() for cache in caches]
    for step, rows in enumerate([(0, 1, 2), (0, 1, 2, 3), (3, 2, 0), (3, 1), (4, 3, 2, 1, 0), (2, 4)]):
        some = [caches[row] for row in rows], [twins[row] for row in rows]
        assert_same_steps(llama, *some, range(3 * step, 3 * step + 3))
    token_ids = tokens_at(99, len(caches))
    torch.testing.assert_close(alone(llama, caches, token_ids), alone(llama, twins, token_ids), atol=1e-3, rtol=1e-3)


def test_a_cache_goes_back_and_forth(llama: LlamaCppEngine) -> None:
    """Rows of dropped tokens, forks and tokens that a cache reads alone in between."""
    caches = unequal(llama)
    twins = [cache.fork() for cache in caches]
    assert_same_steps(llama, caches, twins, range(5))
    fork, twin_fork = caches[0].fork(), twins[0].fork()
    for cache in (caches[2], twins[2]):
        cache.crop(-4)
        llama.forward(cache, [9, 8], num_logits=1)
    for cache in (caches[1], twins[1]):
        cache.crop(-5)
        llama.forward(cache, [77], num_logits=1)
    assert_same_steps(llama, [*caches, fork], [*twins, twin_fork], range(5, 9))


def test_a_snapshot_stays_what_it_was(llama: LlamaCppEngine) -> None:
    """A seat whose cache has left is another's only once nothing refers to it."""
    caches, others = unequal(llama), [cache_with(llama, 60), cache_with(llama, 61), cache_with(llama, 62)]
    together(llama, caches, tokens_at(0, 3))
    states, twins = [cache.state() for cache in caches], [cache.fork() for cache in caches]
    for cache in caches:
        cache.reset()
    for step in range(3):
        together(llama, others, tokens_at(step, 3))
    for cache, state in zip(caches, states, strict=True):
        cache.restore(state)
    assert_same_steps(llama, caches, twins, range(1, 3))


def test_memory_of_a_cache_that_is_gone_is_free(llama: LlamaCppEngine) -> None:
    caches = [cache_with(llama, 60), cache_with(llama, 61)]
    together(llama, caches, [1, 2])
    kernel = llama._batches and llama._batches._batch_kernel
    assert kernel and kernel._seats
    layer, seat = kernel._seats.layers[0], pool_of(caches[1]).seat
    assert seat is not None
    assert not layer.is_free(seat)
    del caches[1]
    gc.collect()
    assert layer.is_free(seat)
    together(llama, [*caches, cache_with(llama, 40)], [3, 4])
    assert kernel._seats.layers[0] is layer


def pool_of(cache: KVCache) -> Pool:
    pool = cache.compactable[0].buffer
    assert isinstance(pool, Pool)
    return pool


def test_queries_go_to_those_who_want_them(llama: LlamaCppEngine) -> None:
    caches = unequal(llama)
    twin, heard, expected = caches[2].fork(), list[tuple[Tensor, ...]](), list[tuple[Tensor, ...]]()
    llama.forward_batch(caches, [40, 41, 42], [None, None, lambda *query: heard.append(query[1:])])
    llama.forward(twin, [42], on_query=lambda *query: expected.append(query[1:]))
    assert len(heard) == len(twin.compactable)
    torch.testing.assert_close(heard, expected, atol=1e-3, rtol=1e-3)


def test_sessions_answer_together_as_alone(llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while one is compacted, and after one has ended."""
    policy, sizes, read = POLICY.with_changes(trigger_tokens=120), list[int](), llama.forward_batch
    monkeypatch.setattr(
        llama, "forward_batch", lambda caches, *args: (sizes.append(len(caches)), read(caches, *args))[1]
    )

    def answers_of(memory: Memory) -> list[Generation]:
        sessions = [memory.session(str(number)) for number in range(3)]
        for number, session in enumerate(sessions):
            session.append(TEXT[: 40 + 30 * number])
        return [session.generate(50 + 20 * row) for row, session in enumerate(sessions)]

    expected = [[piece.text for piece in answer] for answer in answers_of(Memory(llama, policy))]
    memory, texts = Memory(llama, policy), list[list[str]]([[], [], []])
    answers = answers_of(memory)
    for answer, piece in memory.generate_many(answers):
        texts[answers.index(answer)].append(piece.text)
    assert texts == expected
    assert set(sizes) >= {2, 3}


def test_shared_heads_are_read_one_by_one(shared_llama: LlamaCppEngine) -> None:
    caches = [shared_llama.new_cache(), shared_llama.new_cache()]
    for cache in caches:
        shared_llama.forward(cache, [1, 2, 3])
    assert shared_llama.forward_batch(caches, [4, 5], [None, None]) is None
    assert [cache.num_tokens for cache in caches] == [3, 3]


def test_a_pass_that_computes_something_else_is_found_out(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llama = LlamaCppEngine(tiny_gguf, kv_type="f32")
    caches = [llama.new_cache(), llama.new_cache()]
    for cache in caches:
        llama.forward(cache, [1, 2, 3])
    read = BatchKernel.read
    monkeypatch.setattr(BatchKernel, "read", lambda *args: read(*args).flip(0))
    states = [cache.state() for cache in caches]
    assert llama.forward_batch(caches, [4, 5], [None, None]) is None
    assert "reads sessions one by one: this llama.cpp does not do what the engine relies on" in caplog.text
    assert [cache.state() for cache in caches] == states
