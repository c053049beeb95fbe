"""Biases kept beside the cells and added to the scores: the other engine's mathematics, in llama.cpp's cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inside import cache_of, state_of
from torch import Tensor

from am_memory import Memory, MemoryPolicy, Session
from am_memory.engines.base import Engine
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, UnsupportedModel

POLICY = MemoryPolicy(
    trigger_tokens=300,
    keep_ratio=0.25,
    pinned=4,
    keep_recent=8,
    head_budget="uniform",
    ridge=1e-3,
    reference_queries=("repeat",),
)
TEXT = "An owl is a bird that hunts at night, and sleeps by day. It hears a mouse under the snow, and flies without a sound. "
PROBE = "Owls"


@pytest.fixture(scope="module")
def exact_llama(tiny_gguf: Path) -> LlamaCppEngine:
    return LlamaCppEngine(tiny_gguf, kv_type="f32", exact_bias=True)


def compacted(engine: Engine, *, store: Path | None = None) -> Session:
    """100 tokens, 48 of them in 12 slots for each head, and the queries of later ones."""
    session = Memory(engine, POLICY, store=store).session("owls")
    session.append(TEXT[:100])
    session.compact(0.5)
    return session


def masses(session: Session) -> list[Tensor]:
    heard: list[Tensor] = []
    cache = cache_of(session).fork()
    session.engine.forward(cache, [ord(letter) for letter in PROBE], on_query=lambda _, query, mass: heard.append(mass))
    return heard


def test_logits_are_those_of_the_other_engine(exact_llama: LlamaCppEngine, engine: TransformersEngine) -> None:
    ours, reference = compacted(exact_llama), compacted(engine)
    assert ours.stats.kv_tokens == reference.stats.kv_tokens
    torch.testing.assert_close(ours.logits(PROBE), reference.logits(PROBE), atol=2e-3, rtol=1e-3)


def test_the_mass_that_queries_see_has_the_biases_in_it(
    exact_llama: LlamaCppEngine, engine: TransformersEngine
) -> None:
    """It says how much a block matters to a query, when the next compaction is fitted."""
    for ours, reference in zip(masses(compacted(exact_llama)), masses(compacted(engine)), strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-3, rtol=1e-3)


def test_biases_are_there_and_counted(exact_llama: LlamaCppEngine) -> None:
    session = compacted(exact_llama)
    content = state_of(session)
    for layer in content.layers:
        bias = layer.slots.bias.view(2, 4 + 12)
        assert not bias[:, :4].any()
        assert bias[:, 4:].any()
    cell_bytes = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head_dim, float32
    assert session.stats.kv_bytes == session.stats.kv_tokens * cell_bytes + 3 * 2 * (4 + 12) * 4


def test_a_long_conversation_goes_on(exact_llama: LlamaCppEngine) -> None:
    session = Memory(exact_llama, POLICY.model_copy(update={"trigger_tokens": 120})).session()
    for _ in range(6):
        session.append(TEXT)
    content = state_of(session)
    assert session.stats.num_compactions > 5
    assert {bias.shape for bias in content.biases} == {(2, content.base_cells)}
    assert session.logits(PROBE).isfinite().all()


def test_a_fork_has_the_biases_of_its_own_cells(exact_llama: LlamaCppEngine) -> None:
    session = compacted(exact_llama)
    before = session.logits(PROBE)
    branch = session.fork()
    branch.append(TEXT)
    branch.compact(1.0)
    session.append(" Dogs do.")
    session.rewind(100)
    torch.testing.assert_close(session.logits(PROBE), before, atol=1e-4, rtol=1e-4)


def test_a_saved_session_keeps_its_biases(exact_llama: LlamaCppEngine, tmp_path: Path) -> None:
    session = compacted(exact_llama, store=tmp_path)
    session.save()
    loaded = Memory(exact_llama, POLICY, store=tmp_path).session("owls")
    assert loaded.stats == session.stats
    assert torch.equal(loaded.logits(PROBE), session.logits(PROBE))


def test_folded_and_exact_caches_are_not_exchanged(exact_llama: LlamaCppEngine, llama: LlamaCppEngine) -> None:
    assert exact_llama.info.fingerprint != llama.info.fingerprint


def test_flash_attention_has_no_scores_to_add_to(tiny_gguf: Path) -> None:
    with pytest.raises(InvalidInput, match="exact_bias adds biases to the scores"):
        LlamaCppEngine(tiny_gguf, exact_bias=True, flash_attention=True)


def test_biases_that_go_nowhere_are_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("am_memory.engines.llama_cpp.capture.PRODUCT", b"another name-")
    with pytest.raises(UnsupportedModel, match="biases are not added to the scores"):
        LlamaCppEngine(tiny_gguf, exact_bias=True)
