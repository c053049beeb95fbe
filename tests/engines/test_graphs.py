"""One token as a CUDA graph: the same logits, wherever the cache goes meanwhile. Without a GPU, what a graph would
launch is called again instead, over kernels in Triton's interpreter: it sees as little of the cache as a graph does."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from driven import logits_in_turn
from inside import graphs_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.engines.transformers import TransformersEngine, fused, graphs
from am_memory.engines.transformers import engine as engine_module
from am_memory.engines.transformers.graphs import PATIENCE, TokenGraphs, token_graphs

pytest.importorskip("triton", reason="Triton has no build for this machine")

NewModel = Callable[[], PreTrainedModel]
ON_GPU = torch.cuda.is_available()
POLICY = MemoryPolicy(trigger_tokens=48, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(110)]
SPARE_TOKENS = 16


class Called:
    """In a recorder's place: a graph that calls the function again, whose Python must not matter any more."""

    is_possible = True

    def __init__(self, device: torch.device) -> None:
        self.num_captured = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.num_captured += 1
        result = run()
        return lambda: result.copy_(run()), result


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SPARE_TOKENS", SPARE_TOKENS)
    if ON_GPU:
        return
    in_pass, run = [], TokenGraphs._pass

    def through_the_kernels(self: TokenGraphs, *args: object) -> Tensor:
        in_pass.append(True)
        try:
            return run(self, *args)
        finally:
            in_pass.pop()

    monkeypatch.setattr(graphs, "Recorder", Called)
    monkeypatch.setattr(TokenGraphs, "_pass", through_the_kernels)
    monkeypatch.setattr(fused, "can_attend", lambda query, value: bool(in_pass))  # else the faster path of CPUs


NewEngine = Callable[..., TransformersEngine]


@pytest.fixture
def new_engine(new_tiny_model: NewModel, byte_tokenizer: PreTrainedTokenizerBase) -> NewEngine:
    """The tiny model, with graphs or without, on the device that there is."""

    def new(*, has_graphs: bool = True) -> TransformersEngine:
        with pytest.MonkeyPatch.context() as patched:
            if not has_graphs:
                patched.setattr(engine_module, "token_graphs", lambda *_: None)
            elif not ON_GPU:
                patched.setattr(engine_module, "token_graphs", lambda model, read, *_: TokenGraphs(read, model.device))
            return TransformersEngine(new_tiny_model().to("cuda" if ON_GPU else "cpu"), byte_tokenizer)

    return new


@pytest.fixture
def engine(new_engine: NewEngine) -> TransformersEngine:
    return new_engine()


@pytest.fixture
def plain(new_engine: NewEngine) -> TransformersEngine:
    """The same without."""
    return new_engine(has_graphs=False)


@pytest.fixture
def num_replayed(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many tokens the engine has read by graphs."""
    count, read = [], graphs._CacheGraph.replayed
    monkeypatch.setattr(graphs._CacheGraph, "replayed", lambda graph: (count.append(graph), read(graph))[1])
    yield lambda: len(count)


def decoded(engine: TransformersEngine, policy: MemoryPolicy = POLICY) -> Tensor:
    return logits_in_turn(Memory(engine, policy), TOKENS, least_compactions=1)


def one_by_one(engine: TransformersEngine, cache: object, tokens: list[int]) -> Tensor:
    return torch.cat([engine.forward(cache, [token], num_logits=1) for token in tokens]).cpu()


def test_logits_are_the_same_over_compactions_in_two_sessions_in_turn(
    engine: TransformersEngine, plain: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    assert torch.allclose(decoded(engine), decoded(plain), atol=1e-4)
    assert num_replayed() > len(TOKENS) / 2


def test_slots_in_int8_are_read_too(
    engine: TransformersEngine, plain: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    policy = POLICY.model_copy(update={"segment_dtype": "int8"})
    assert torch.allclose(decoded(engine, policy), decoded(plain, policy), atol=1e-4)
    assert num_replayed() > len(TOKENS) / 2


def test_a_graph_lasts_until_the_tail_is_full_and_the_tail_has_no_more_room_than_it_says(
    engine: TransformersEngine, plain: TransformersEngine
) -> None:
    captured = []
    record = graphs_of(engine)._captured
    graphs_of(engine)._captured = lambda run: captured.append(run) or record(run)
    graphs_of(engine)._captured.is_possible = True  # type: ignore[attr-defined]
    tokens = TOKENS[: PATIENCE + SPARE_TOKENS + 4]
    logits = []
    for each in (engine, plain):
        cache = each.new_cache()
        logits.append(one_by_one(each, cache, tokens))
        assert cache.num_tokens == len(tokens)
    assert torch.allclose(*logits, atol=1e-4)
    assert len(captured) == 2
    cache = engine.new_cache()
    one_by_one(engine, cache, tokens[:8])
    assert {layer.room + layer.length for layer in cache.layers} == {PATIENCE - 1 + SPARE_TOKENS}


def test_a_fork_and_its_origin_go_on_apart(engine: TransformersEngine, plain: TransformersEngine) -> None:
    logits = []
    for each in (engine, plain):
        cache = each.new_cache()
        one_by_one(each, cache, TOKENS[:12])
        branch = cache.fork()
        rows = [one_by_one(each, cache, TOKENS[20:32]), one_by_one(each, branch, TOKENS[40:52])]
        logits.append(torch.cat([*rows, one_by_one(each, cache, TOKENS[60:70])]))
    assert torch.allclose(*logits, atol=1e-4)


def test_going_back_reading_a_prompt_and_restoring_leave_the_graph_right(
    engine: TransformersEngine, plain: TransformersEngine
) -> None:
    logits = []
    for each in (engine, plain):
        cache = each.new_cache()
        one_by_one(each, cache, TOKENS[:12])
        state = cache.state()
        rows = [one_by_one(each, cache, TOKENS[20:26])]
        cache.truncate(14)
        rows.append(one_by_one(each, cache, TOKENS[30:36]))
        each.forward(cache, TOKENS[:30])
        rows.append(one_by_one(each, cache, TOKENS[40:46]))
        cache.restore(state)
        rows.append(one_by_one(each, cache, TOKENS[50:60]))
        logits.append(torch.cat(rows))
    assert torch.allclose(*logits, atol=1e-4)


def test_whoever_listens_to_queries_hears_each_token(
    engine: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    cache, heard = engine.new_cache(), []
    for token in TOKENS[:20]:
        engine.forward(cache, [token], num_logits=1, on_query=lambda index, *_: heard.append(index))
    assert heard == [0, 1, 2] * 20
    assert num_replayed() == 0


def test_a_session_writes_the_same(engine: TransformersEngine, plain: TransformersEngine) -> None:
    texts = []
    for each in (engine, plain):
        session = Memory(each, POLICY).session()
        session.append("The owl sat on the old oak.")
        texts.append([token for piece in session.generate(60, Sampling()) for token in piece.token_ids])
        assert session.stats.num_compactions > 0
    assert texts[0] == texts[1]


def test_generate_of_transformers_reads_its_tokens_so(
    engine: TransformersEngine, plain: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    outputs = []
    for each in (engine, plain):
        cache = Memory(each, POLICY).cache()
        prompt = torch.tensor([TOKENS[:20]], device=each.model.device)
        how = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "output_logits": True}
        output = each.model.generate(prompt, **{each._cache_argument: cache}, return_dict_in_generate=True, **how)
        assert len(cache.segments) > 0
        outputs.append((output.sequences.cpu(), torch.cat(output.logits).cpu()))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.allclose(outputs[0][1], outputs[1][1], atol=1e-4)
    assert num_replayed() > 30


def test_whoever_asks_a_model_for_more_than_logits_gets_it(
    engine: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    cache = Memory(engine, POLICY).cache()
    model, argument = engine.model, engine._cache_argument
    ids = torch.tensor([TOKENS[:1]], device=model.device)
    with torch.no_grad():
        for _ in range(PATIENCE + 1):
            model(ids, **{argument: cache})
        before = num_replayed()
        assert before == 1
        assert len(model(ids, **{argument: cache}, output_hidden_states=True).hidden_states) == 4
        assert isinstance(model(ids, **{argument: cache}, return_dict=False), tuple)
        assert model(ids, **{argument: cache}, labels=ids).loss is not None
        elsewhere = torch.tensor([[300]], device=model.device)
        model(ids, **{argument: cache}, position_ids=elsewhere)
    assert num_replayed() == before
    assert cache.num_tokens == PATIENCE + 5


def test_logits_stay_what_they_were(engine: TransformersEngine) -> None:
    cache = engine.new_cache()
    one_by_one(engine, cache, TOKENS[:10])
    logits = engine.forward(cache, [TOKENS[10]], num_logits=1)
    before = logits.clone()
    engine.forward(cache, [TOKENS[11]], num_logits=1)
    assert torch.equal(logits, before)


def test_what_a_cache_gives_up_is_not_kept(engine: TransformersEngine) -> None:
    graphs_of(engine)._captured = lambda run: (lambda: None, run())
    graphs_of(engine)._captured.is_possible = True
    cache = engine.new_cache()
    one_by_one(engine, cache, TOKENS[:10])
    assert len(graphs_of(engine)._graphs) == 1
    buffer = weakref.ref(cache.layers[0].buffer)
    cache.restore(engine.new_cache().state())
    gc.collect()
    assert buffer() is None
    del cache
    gc.collect()
    assert len(graphs_of(engine)._graphs) == 0


def test_no_more_caches_than_so_many_have_a_graph(
    engine: TransformersEngine, plain: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_CACHES", 1)
    assert torch.allclose(decoded(engine), decoded(plain), atol=1e-4)
    assert len(graphs_of(engine)._graphs) == 1


def test_where_a_pass_cannot_be_captured_tokens_are_read_as_they_were(
    engine: TransformersEngine, plain: TransformersEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(run: Callable[[], Tensor]) -> None:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs_of(engine)._captured = failing
    failing.is_possible = True  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "am_memory"):
        assert torch.allclose(decoded(engine), decoded(plain), atol=1e-4)
    assert [record.getMessage() for record in caplog.records] == [
        "tokens are read without CUDA graphs from now on: operation not permitted when stream is capturing"
    ]


def test_beside_another_stream_nothing_is_captured_and_afterwards_what_is_new_is_run_first(
    engine: TransformersEngine, plain: TransformersEngine, num_replayed: Callable[[], int]
) -> None:
    order: list[str] = []
    record, run = graphs_of(engine)._captured, graphs_of(engine)._pass
    graphs_of(engine)._captured = lambda of: (order.append("captured"), record(of))[1]
    graphs_of(engine)._pass = lambda *args: (order.append("run"), run(*args))[1]
    logits = []
    for each in (engine, plain):
        cache, rows = each.new_cache(), []
        for is_possible in (False, True):
            graphs_of(engine)._captured.is_possible = is_possible
            rows.append(one_by_one(each, cache, TOKENS[:8]))
            if each is engine:
                assert (num_replayed() > 0) == is_possible
        logits.append(torch.cat(rows))
    assert torch.allclose(*logits, atol=1e-4)
    assert order[:2] == ["run", "captured"]


def test_a_model_whose_pass_depends_on_python_is_found_out(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would that looks at the position itself: a graph goes on with what it saw."""

    def frozen(cache: object, token_id: Tensor, position: Tensor) -> Tensor:
        logits = engine._read_token(cache, token_id, position)
        return logits if cache.layers[0].write_position is None else logits.flip(-1)

    monkeypatch.setattr(graphs, "can_have_graphs", lambda model, cache: True)
    assert token_graphs(engine.model, frozen, engine.new_cache) is None
    assert "computes something else as a CUDA graph" in caplog.text
    assert token_graphs(engine.model, engine._read_token, engine.new_cache) is not None


def test_a_model_that_waits_for_the_device_is_found_out_before_anything_is_captured(
    engine: TransformersEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(cache: object, token_id: Tensor, position: Tensor) -> Tensor:
        logits = engine._read_token(cache, token_id, position)
        return logits if logits.sum() < torch.inf else -logits

    monkeypatch.setattr(graphs, "can_have_graphs", lambda model, cache: True)
    caplog.set_level(logging.INFO, "am_memory")
    monkeypatch.setattr(TokenGraphs, "read", None)
    assert token_graphs(engine.model, waiting, engine.new_cache) is None
    assert "waits for the device (aten._local_scalar_dense.default): it has no CUDA graphs" in caplog.text


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_random_numbers_as_they_were() -> None:
    device = torch.device("cuda")
    recorder = graphs.Recorder(device)
    torch.manual_seed(3)
    expected = torch.randn(4, device=device)
    torch.manual_seed(3)
    for failing in (lambda: expected[expected > 0], lambda: expected[10]):
        with pytest.raises((RuntimeError, IndexError)):
            recorder(failing)
    torch.testing.assert_close(torch.randn(4, device=device), expected)


def test_a_cpu_and_sliding_windows_have_none(
    new_tiny_model: NewModel, new_sliding_model: NewModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert TransformersEngine(new_tiny_model(), byte_tokenizer)._graphs is None
    sliding = new_sliding_model().to("cuda" if ON_GPU else "cpu")
    assert TransformersEngine(sliding, byte_tokenizer)._graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_model_on_a_gpu_has_graphs(
    new_tiny_model: NewModel, byte_tokenizer: PreTrainedTokenizerBase, plain: TransformersEngine, compile: bool
) -> None:
    engine = TransformersEngine(new_tiny_model().to("cuda"), byte_tokenizer, compile=compile)
    assert graphs_of(engine) is not None
    assert torch.allclose(decoded(engine), decoded(plain), atol=1e-4)
