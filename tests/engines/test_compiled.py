"""Compiled layers: the same logits, nothing compiled again, and everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from driven import logits_in_turn
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.compiled import CompiledLayer
from am_memory.errors import EngineFailed, InvalidInput, UnsupportedModel

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="torch.compile needs a C++ compiler, and there is none",
)
NewModel = Callable[[], PreTrainedModel]
POLICY = MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=6, pinned=4, chunk_tokens=16)
TOKENS = [(17 * position * position + 5 * position) % 256 for position in range(300)]


@pytest.fixture(scope="module")
def compiled(new_tiny_model: NewModel, byte_tokenizer: PreTrainedTokenizerBase) -> TransformersEngine:
    """The tiny model behind our engine, its layers compiled by Inductor."""
    return TransformersEngine(new_tiny_model(), byte_tokenizer, compile=True)


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces and guards, and runs what it traced as it is, which takes no compiler and little time.

    A new function for each test: torch reuses the graphs of another test's model only for the same backend.
    """

    def run_as_traced(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run_as_traced))


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """No graph is made inside, and no code is left to Python because there were too many."""
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == graphs


def layers_of(engine: TransformersEngine) -> list[CompiledLayer]:
    return [part.forward for part in engine.model.modules() if isinstance(part.forward, CompiledLayer)]


def decoded(engine: TransformersEngine) -> Tensor:
    return logits_in_turn(Memory(engine, POLICY), TOKENS, least_compactions=2)


@needs_compiler
def test_logits_are_those_of_the_model_as_it_is_over_compactions_and_sessions(
    compiled: TransformersEngine, engine: TransformersEngine
) -> None:
    assert torch.allclose(decoded(compiled), decoded(engine), atol=1e-4)


@needs_compiler
def test_nothing_is_compiled_again_for_tokens_compactions_sessions_and_generate(compiled: TransformersEngine) -> None:
    with nothing_compiled():
        decoded(compiled)
        cache = Memory(compiled, POLICY).cache()
        compiled.model.generate(
            torch.tensor([TOKENS[:20]]), cache=cache, max_new_tokens=80, do_sample=False, eos_token_id=None
        )
        assert len(cache.segments) > 0


@needs_compiler
def test_captured_queries_are_the_models_own_and_stay_what_they_were(
    compiled: TransformersEngine, engine: TransformersEngine
) -> None:
    """A graph writes the next results into the buffers that its queries were in."""
    heard: dict[TransformersEngine, list[Tensor]] = {compiled: [], engine: []}
    for each, queries in heard.items():
        cache = each.new_cache()
        each.forward(cache, TOKENS[:20])
        for token in TOKENS[20:25]:
            each.forward(cache, [token], on_query=lambda _, *taken, queries=queries: queries.extend(taken))
    assert len(heard[engine]) == 2 * 3 * 5
    for actual, expected in zip(*heard.values(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)


@needs_compiler
def test_a_cache_of_transformers_goes_through_the_layers_as_they_were(
    compiled: TransformersEngine, stock_model: PreTrainedModel
) -> None:
    for layer in layers_of(compiled):
        layer.has_run = False
    logits = []
    for model in (compiled.model, stock_model):
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.tensor([TOKENS[:20]]), cache=cache)
            logits.append(model(torch.tensor([TOKENS[20:21]]), cache=cache).logits)
    assert torch.equal(*logits)
    assert not any(layer.has_run for layer in layers_of(compiled))


@needs_compiler
def test_a_gradient_is_taken_through_the_layers_as_they_were(compiled: TransformersEngine) -> None:
    cache = compiled.new_cache()
    compiled.forward(cache, TOKENS[:20])
    embeddings = compiled.model.get_input_embeddings()(torch.tensor([TOKENS[20:21]])).requires_grad_()
    compiled.model(inputs_embeds=embeddings, cache=cache).logits.sum().backward()
    assert embeddings.grad is not None


def test_layers_with_a_sliding_window_are_compiled_once_and_the_others_once(
    no_backend: None, new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    graphs = counters["stats"]["unique_graphs"]
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer, compile=True)
    assert counters["stats"]["unique_graphs"] - graphs == 2
    with nothing_compiled():
        logits = decoded(engine)
    assert torch.allclose(logits, decoded(TransformersEngine(new_sliding_model(), byte_tokenizer)), atol=1e-4)


def failing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
    raise RuntimeError("no compiler here")


def test_a_machine_that_cannot_compile_says_so_and_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, new_tiny_model: NewModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = new_tiny_model()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=failing))
    with pytest.raises(EngineFailed, match=r"LlamaForCausalLM.*no compiler here.*compile=False"):
        TransformersEngine(model, byte_tokenizer, compile=True)
    engine = TransformersEngine(model, byte_tokenizer)
    assert not layers_of(engine)
    assert engine.forward(engine.new_cache(), [1], num_logits=1).isfinite().all()


def forgetful(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(*args: object, am_memory_is_deferred: bool = False, **told: object) -> Tensor:
        return forward(*args, **told)

    return layer


def strict(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(*args: object, **told: object) -> Tensor:
        if told.pop("am_memory_is_deferred", False):
            raise TypeError("an unexpected keyword argument")
        return forward(*args, **told)

    return layer


@pytest.mark.parametrize("other", [forgetful, strict])
def test_layers_that_do_not_pass_on_what_they_are_told_are_refused(
    other: Callable[..., Callable[..., Tensor]],
    no_backend: None,
    monkeypatch: pytest.MonkeyPatch,
    new_tiny_model: NewModel,
    byte_tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = new_tiny_model()
    monkeypatch.setattr(LlamaDecoderLayer, "forward", other(LlamaDecoderLayer.forward))
    with pytest.raises(UnsupportedModel, match="compile=False"):
        TransformersEngine(model, byte_tokenizer, compile=True)
    assert not layers_of(TransformersEngine(model, byte_tokenizer))


def test_llama_cpp_is_not_compiled() -> None:
    with pytest.raises(InvalidInput, match="llama.cpp"):
        Memory.from_pretrained("demo", engine="llama_cpp", compile=True)
