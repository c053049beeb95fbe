"""Ragged, biased slots behind llama.cpp: the same sessions as on the transformers engine, whose code they share."""

from __future__ import annotations

import _thread
import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from operator import methodcaller
from pathlib import Path

import pytest
import torch
from inside import cache_of, rebuild, slots_of
from policies import plain_policy
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.base import Engine
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp.graph import LayerNodes
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.llama_cpp.pool import Pool
from am_memory.engines.llama_cpp.token_kernel import TokenKernel
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import UnsupportedModel

POLICY = plain_policy(trigger_tokens=300, keep_ratio=0.25, pinned=4, keep_recent=8)
TEXT = "An owl is a bird that hunts at night, and sleeps by day. It hears a mouse under the snow, and flies without a sound. "
PROBE = "Owls"


def compacted(engine: Engine, *, store: Path | None = None, policy: MemoryPolicy = POLICY) -> Session:
    """100 tokens, 48 of them in 12 slots for each head on the mean."""
    session = Memory(engine, policy, store=store).session("owls")
    session.append(TEXT[:100])
    session.compact(0.5)
    return session


def told(engine: Engine, times: int, **changes: object) -> Session:
    """The text so many times, compacted on the way."""
    session = Memory(engine, POLICY.with_changes(**changes)).session()
    for _ in range(times):
        session.append(TEXT)
    return session


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def masses(session: Session) -> list[Tensor]:
    heard: list[Tensor] = []
    cache = cache_of(session).fork()
    session.engine.forward(cache, [ord(letter) for letter in PROBE], on_query=lambda _, query, mass: heard.append(mass))
    return heard


# The same as on the other engine


def test_heads_differ_in_their_slots(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    ours, reference = compacted(llama), compacted(engine)
    assert [slots.cu_slots for slots in slots_of(ours)] == [slots.cu_slots for slots in slots_of(reference)]
    assert len({end - start for slots in slots_of(ours) for start, end in pairwise(slots.cu_slots)}) > 2
    assert ours.stats.kv_tokens == reference.stats.kv_tokens
    assert ours.stats.kv_bytes == reference.stats.kv_bytes
    assert_same(ours.logits(PROBE), reference.logits(PROBE), 2e-3)


def test_the_mass_that_queries_see_has_the_biases_in_it(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    """It says how much a block matters to a query, when the next compaction is fitted."""
    for ours, reference in zip(masses(compacted(llama)), masses(compacted(engine)), strict=True):
        assert_same(ours, reference, 2e-3)


def test_a_long_conversation_ends_with_the_same_slots(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    ours, reference = (told(each, 6, trigger_tokens=120) for each in (llama, engine))
    assert ours.stats.num_compactions == reference.stats.num_compactions > 5
    assert_same(ours.logits(PROBE), reference.logits(PROBE), 2e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_dtype": "int8"},
        {"experiments": Experiments(on_policy=True)},
        {"experiments": Experiments(summary_tokens=8)},
        {"head_budget": "uniform"},
        {"max_error": 0.01},
    ],
    ids=["int8", "on policy", "summary", "uniform", "gate"],
)
def test_a_policy_does_what_it_does_there(
    llama: LlamaCppEngine, engine: TransformersEngine, changes: dict[str, object]
) -> None:
    ours, reference = (compacted(each, policy=POLICY.with_changes(**changes)) for each in (llama, engine))
    assert ours.stats.kv_tokens == reference.stats.kv_tokens
    assert_same(ours.logits(PROBE), reference.logits(PROBE), 2e-2)


def test_originals_come_back(llama: LlamaCppEngine) -> None:
    session = compacted(llama, policy=POLICY.with_changes(originals="host"))
    exact = Memory(llama, POLICY).session()
    exact.append(TEXT[:100])
    expected = exact.logits(PROBE)
    before = (session.logits(PROBE) - expected).norm()
    session.recall(session.search(TEXT[:20])[0])
    assert (session.logits(PROBE) - expected).norm() < 0.1 * before


def test_a_segment_is_fitted_again(llama: LlamaCppEngine) -> None:
    session = compacted(llama, policy=POLICY.with_changes(originals="host"))
    before = slots_of(session)[0].value
    session.refine()
    assert not torch.equal(slots_of(session)[0].value, before)


# Going back, and apart


def test_nothing_compacted_is_the_model(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    said = []
    for each in (llama, engine):
        session = Memory(each, POLICY).session()
        session.append(TEXT)
        said.append([token for piece in session.generate(12, Sampling()) for token in piece.token_ids])
    assert said[0] == said[1]


def test_compacting_to_full_size_changes_nothing(llama: LlamaCppEngine) -> None:
    policy = POLICY.with_changes(keep_ratio=1.0, max_compact_tokens=100, experiments=Experiments(fit="nothing"))
    session = Memory(llama, policy).session()
    session.append(TEXT[:100])
    before = session.logits(PROBE), [piece.text for piece in session.fork().generate(8, Sampling())]
    session.compact(0.7)
    assert session.stats.num_segments == 1
    assert_same(session.logits(PROBE), before[0])
    assert [piece.text for piece in session.generate(8, Sampling())] == before[1]


def test_a_fork_goes_on_by_itself(llama: LlamaCppEngine) -> None:
    session = compacted(llama)
    before = session.logits(PROBE)
    branch = session.fork()
    list(branch.generate(8, Sampling()))
    branch.append(TEXT)
    branch.compact(1.0)
    list(session.generate(5, Sampling()))
    session.append(" Dogs do.")
    session.rewind(100)
    assert_same(session.logits(PROBE), before)


def test_a_rebuild_gives_the_same(llama: LlamaCppEngine) -> None:
    session = compacted(llama)
    before = session.logits(PROBE)
    rebuild(session)
    assert_same(session.logits(PROBE), before)


@pytest.mark.parametrize("segment_dtype", ["model", "int8"])
def test_a_saved_session_is_the_same(llama: LlamaCppEngine, tmp_path: Path, segment_dtype: str) -> None:
    policy = POLICY.with_changes(segment_dtype=segment_dtype)
    session = compacted(llama, store=tmp_path, policy=policy)
    list(session.generate(4, Sampling()))
    session.save()
    loaded = Memory(llama, policy, store=tmp_path).session("owls")
    assert loaded.stats.kv_tokens == session.stats.kv_tokens
    assert loaded.stats.kv_bytes <= session.stats.kv_bytes  # without room for further tokens
    assert_same(loaded.logits(PROBE), session.logits(PROBE))


def test_what_a_listener_raises_leaves_the_cache_as_it_was(llama: LlamaCppEngine) -> None:
    session = compacted(llama)
    cache, before = cache_of(session), session.logits(PROBE)
    tokens = cache.num_tokens

    def stop(index: int, *_: object) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llama.forward(cache, [1, 2, 3], on_query=stop)
    assert cache.is_whole
    assert cache.num_tokens == tokens
    assert_same(session.logits(PROBE), before)


# Single tokens


@pytest.mark.parametrize("fraction", [None, 0.5, 1.0])
@pytest.mark.parametrize("segment_dtype", ["model", "int8"])
def test_the_kernel_attends_to_all_slots(llama: LlamaCppEngine, fraction: float | None, segment_dtype: str) -> None:
    """Tokens one by one by llama.cpp's kernel, and all at once by this project's attention."""
    session = Memory(llama, POLICY.with_changes(segment_dtype=segment_dtype)).session()
    session.append(TEXT[:100])
    if fraction is not None:
        session.compact(fraction)
    one_by_one, at_once, tokens = cache_of(session).fork(), cache_of(session).fork(), list(range(40, 120))
    expected = llama.forward(at_once, tokens, num_logits=len(tokens))
    actual = torch.cat([llama.forward(one_by_one, [token], num_logits=1) for token in tokens])
    assert_same(actual, expected, 2e-2)  # the kernel takes biases as float16
    assert all(isinstance(layer.buffer, Pool) for layer in one_by_one.compactable)


def test_the_kernels_masks_and_decoded_slots_are_counted(llama: LlamaCppEngine) -> None:
    """`kv_bytes` said less than what a session takes while it decodes."""
    session = Memory(llama, POLICY.with_changes(segment_dtype="int8")).session()
    session.append(TEXT[:100])
    session.compact(0.5)
    cache = cache_of(session)
    before = cache.nbytes
    llama.forward(cache, [40])
    pools = [layer.buffer for layer in cache.compactable if isinstance(layer.buffer, Pool)]
    assert len(pools) == len(cache.compactable)
    decoded = sum(2 * 4 * pool.num_slots * pool.key.shape[3] for pool in pools)
    assert cache.nbytes - before >= decoded + sum(pool.mask.nbytes for pool in pools)


def test_sessions_take_turns(llama: LlamaCppEngine) -> None:
    """One graph of llama.cpp serves all caches, with and without slots."""
    caches = [cache_of(compacted(llama)), cache_of(compacted(llama, policy=POLICY.with_changes(keep_ratio=0.5)))]
    caches.append(llama.new_cache())
    llama.forward(caches[-1], [1, 2, 3])
    alone = [cache.fork() for cache in caches]
    tokens = range(40, 60)
    expected = [torch.cat([llama.forward(cache, [token], num_logits=1) for token in tokens]) for cache in alone]
    in_turn = [[llama.forward(cache, [token], num_logits=1) for cache in caches] for token in tokens]
    for one, rows in zip(expected, zip(*in_turn, strict=True), strict=True):
        assert torch.equal(torch.cat(rows), one)


def test_a_token_without_logits_is_read(llama: LlamaCppEngine) -> None:
    cache = llama.new_cache()
    assert llama.forward(cache, [1]).shape == llama.forward(cache, [2]).shape == (0, 260)
    assert cache.num_tokens == 2


def test_an_interrupt_leaves_no_graph_half_changed(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token would be read by operations that point to memory of the interrupted one."""
    llama = LlamaCppEngine(tiny_gguf, kv_type="f32")
    cache = llama.new_cache()
    llama.forward(cache, [1, 2, 3])
    expected = llama.forward(cache.fork(), [4], num_logits=1)
    point, calls = TokenKernel._point, []

    def interrupted(kernel: TokenKernel, nodes: LayerNodes, index: int) -> None:
        calls.append(nodes)
        if len(calls) == 2:
            raise KeyboardInterrupt
        point(kernel, nodes, index)

    (worker,) = llama._reader._idle
    worker._kernel._graph._make_context()
    monkeypatch.setattr(worker._kernel._graph, "_point", partial(interrupted, worker._kernel))
    with pytest.raises(KeyboardInterrupt):
        llama.forward(cache, [4])
    assert (cache.num_tokens, cache.is_whole) == (3, True)
    assert torch.equal(llama.forward(cache, [4], num_logits=1), expected)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_ctrl_c_while_llama_cpp_computes_is_raised(
    llama: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch, ctrl_c: None, num_tokens: int
) -> None:
    """It was raised before the first line of a callback, where ctypes forgets it: a layer went without its tokens."""
    cache, lib = llama.new_cache(), library()
    llama.forward(cache, [1, 2, 3])
    expected = llama.forward(cache.fork(), range(4, 4 + num_tokens), num_logits=1)
    decode = lib.llama_decode

    def pressed(*args: object) -> object:
        calls: list[Callable[[], object]] = [_thread.interrupt_main, partial(decode, *args)]
        return list(map(methodcaller("__call__"), calls))[-1]  # without a line of Python in between

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lib, "llama_decode", pressed)
        llama.forward(cache, range(4, 4 + num_tokens))
    assert (cache.num_tokens, cache.is_whole) == (3, True)
    assert torch.equal(llama.forward(cache, range(4, 4 + num_tokens), num_logits=1), expected)


def test_a_cache_that_is_gone_leaves_no_memory(llama: LlamaCppEngine) -> None:
    """The kernel kept the keys and values of the session that it had read last, until it read another one."""
    cache = llama.new_cache()
    llama.forward(cache, [1, 2, 3])
    llama.forward(cache, [4])
    pools = [weakref.ref(layer.buffer) for layer in cache.compactable if layer.buffer is not None]
    assert pools
    del cache
    gc.collect()
    assert not any(pool() for pool in pools)


def test_attention_on_a_gpu_is_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be given addresses of host memory."""
    monkeypatch.setattr("am_memory.engines.llama_cpp.graph.is_in_host_memory", lambda address: False)
    with pytest.raises(UnsupportedModel, match="use heads='shared'"):
        LlamaCppEngine(tiny_gguf)


def test_slots_that_go_nowhere_are_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "num_seen", lambda pool, num_tokens: 1)
    with pytest.raises(UnsupportedModel, match="attention over slots of each head is off by"):
        LlamaCppEngine(tiny_gguf)
    LlamaCppEngine(tiny_gguf, heads="shared")


def test_an_output_that_goes_nowhere_is_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("am_memory.engines.llama_cpp.own_attention.write_tensor", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="logits by slots of each head are off by"):
        LlamaCppEngine(tiny_gguf)


# Several texts, and several threads


@pytest.mark.parametrize("segment_dtype", [None, "model", "int8"])
def test_texts_side_by_side_expect_what_they_expect_alone(llama: LlamaCppEngine, segment_dtype: str | None) -> None:
    session = Memory(llama, POLICY.with_changes(segment_dtype=segment_dtype or "model")).session()
    session.append(TEXT[:100])
    if segment_dtype is not None:
        session.compact(0.5)
    cache, texts, further = cache_of(session), [[40, 41, 42, 43], [99], [7, 8, 9]], [[50, 51], [120, 121], [10, 11]]
    tokens = cache.num_tokens

    def alone(texts: list[list[int]]) -> Tensor:
        return torch.cat([llama.forward(cache.fork(), text, num_logits=1) for text in texts])

    branches = llama.branches(cache, texts)
    assert branches is not None
    assert_same(branches.logits, alone(texts), 2e-2)
    for step in range(2):
        branches.advance(range(3), [new[step] for new in further])
        longer = [[*text, *new[: step + 1]] for text, new in zip(texts, further, strict=True)]
        assert_same(branches.logits, alone(longer))
    branches.advance([0, 2], [70, 71])
    assert_same(branches.logits, alone([[*longer[0], 70], [*longer[2], 71]]))
    assert cache.num_tokens == tokens


def test_shared_heads_have_no_texts_side_by_side(shared_llama: LlamaCppEngine) -> None:
    cache = shared_llama.new_cache()
    shared_llama.forward(cache, [1, 2, 3])
    assert shared_llama.branches(cache, [[4], [5]]) is None


def test_threads_read_at_the_same_time(llama: LlamaCppEngine) -> None:
    tokens = [[(7 * number + 3 * position) % 256 for position in range(80)] for number in range(4)]

    def logits(token_ids: list[int]) -> Tensor:
        cache = llama.new_cache()
        rows = [llama.forward(cache, token_ids[:50], num_logits=1)]
        return torch.cat([*rows, *(llama.forward(cache, [token], num_logits=1) for token in token_ids[50:])])

    expected = [logits(token_ids) for token_ids in tokens]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(logits, tokens))
    assert all(map(torch.equal, actual, expected))


def test_a_compaction_ahead_is_the_same(llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    ours, reference = (told(each, 3, trigger_tokens=120, ahead_tokens=16) for each in (llama, engine))
    assert ours.stats.num_compactions == reference.stats.num_compactions > 1
    assert_same(ours.logits(PROBE), reference.logits(PROBE), 2e-2)
