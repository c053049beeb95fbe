"""Sensitivity curves, measured on the tiny model: one head compacted, all others exact."""

from __future__ import annotations

import pytest
import torch

from am_memory.compaction.sensitivity import CONTINUATION_TOKENS, Probe, calibrate
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, UnsupportedOperation
from am_memory.policy import SINK_TOKENS

TEXT = "The quick brown fox jumps over the lazy dog, and 27 hens look on. " * 4
BLOCK = 100


@pytest.fixture
def probe(engine: TransformersEngine) -> Probe:
    return Probe.read(engine, engine.encode(TEXT)[: SINK_TOKENS + BLOCK + CONTINUATION_TOKENS])


def test_more_slots_lose_less_and_progress_counts_every_pass(engine: TransformersEngine) -> None:
    steps: list[tuple[int, int]] = []
    calibration = calibrate(engine, [TEXT, TEXT[40:]], block_tokens=BLOCK, on_progress=lambda *step: steps.append(step))
    assert calibration.fingerprint == engine.info.fingerprint
    assert calibration.ratios == tuple(count / BLOCK for count in (1, 2, 5, 10, 20, 50))
    assert len(calibration.losses) == 6
    assert all(head[0] > head[3] > head[-1] > 0 for head in calibration.losses)
    assert steps == [(done, 72) for done in range(1, 73)]


def test_a_head_with_all_its_slots_loses_nothing(probe: Probe) -> None:
    assert max(probe.losses(BLOCK)) < 1e-5


def test_only_the_one_head_is_compacted(probe: Probe) -> None:
    """Entries of the other heads, and of all other layers, are as they were."""
    slots = probe.cache.compactable[1].state()
    (layer,) = [probe.cache.layers[1]]
    exact = layer.exact_entries(0, SINK_TOKENS + BLOCK)
    state = probe._compacted(1, 0, _few(probe, 5))
    assert state.layers[0] == probe.full_state.layers[0]
    assert state.layers[2] == probe.full_state.layers[2]
    compacted, other = (state.layers[1].slots.head(head) for head in (0, 1))
    assert compacted.num_slots == SINK_TOKENS + 5
    assert torch.equal(compacted.key[:SINK_TOKENS], exact[0][0, :SINK_TOKENS])
    assert torch.equal(other.key, exact[0][1])
    assert torch.equal(other.value, exact[1][1])
    assert not other.bias.any()
    assert probe.cache.compactable[1].state() == slots


def _few(probe: Probe, count: int):
    """Slots that weigh nothing in particular."""
    from am_memory.kv_cache.slots import Slots

    key, value = probe.cache.compactable[1].exact_entries(SINK_TOKENS, SINK_TOKENS + count)
    return Slots.exact(key[:1], value[:1], start=SINK_TOKENS)


def test_the_cache_is_as_it_was_after_every_pass(probe: Probe) -> None:
    before = probe.full
    list(probe.losses(3))
    assert torch.equal(probe.log_probabilities(probe.full_state), before)


def test_texts_that_are_too_short_are_refused(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInput, match="text 2 has 11 tokens; a block of 100 takes 168: give a longer text"):
        calibrate(engine, [TEXT, "Hello there"], block_tokens=BLOCK)


@pytest.mark.parametrize(("texts", "block_tokens"), [([], 100), ([TEXT], 99)])
def test_a_calibration_needs_a_text_and_blocks_that_can_be_cut(
    engine: TransformersEngine, texts: list[str], block_tokens: int
) -> None:
    with pytest.raises(InvalidInput, match=f"{len(texts)} texts with blocks of {block_tokens} tokens"):
        calibrate(engine, texts, block_tokens=block_tokens)


def test_shared_cells_cannot_be_calibrated(shared_llama: LlamaCppEngine) -> None:
    with pytest.raises(UnsupportedOperation, match="use ragged heads"):
        calibrate(shared_llama, [TEXT])
