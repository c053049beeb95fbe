"""How queries turn with their position, as measured, against the formula of RoPE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_file import write_gguf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp import rotation as rotation_module
from am_memory.engines.llama_cpp.rotation import DISTANCES
from am_memory.errors import UnsupportedModel


def turned(query: Tensor, distance: float, base: float = 10_000.0) -> Tensor:
    """Neighbours of (..., head_dim) turned together, as llama.cpp does for a Llama."""
    head_dim = query.shape[-1]
    angle = distance * base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    pairs = torch.view_as_complex(query.double().view(*query.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).float()


def rotations_of(engine: LlamaCppEngine) -> list[Tensor]:
    return [layer.rotation.later for layer in engine._reader._model.layers]


def test_queries_turn_as_rope_says(shared_llama: LlamaCppEngine) -> None:
    query = torch.randn(5, 16)
    for rotations in rotations_of(shared_llama):
        assert rotations.shape == (len(DISTANCES), 16, 16)
        for distance, rotation in zip(DISTANCES, rotations, strict=True):
            torch.testing.assert_close(query @ rotation.mT, turned(query, distance), atol=5e-3, rtol=0)


def test_scaled_positions_need_not_be_known(
    tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    scaled = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    engine = LlamaCppEngine(write_gguf(tmp_path / "scaled.gguf", tiny_model, byte_tokenizer, **scaled), heads="shared")
    query, rotation = torch.randn(5, 16), rotations_of(engine)[1][-1]
    torch.testing.assert_close(query @ rotation.mT, turned(query, DISTANCES[-1] / 4), atol=5e-3, rtol=0)


@pytest.mark.parametrize("distance", [0, 1, 37, 4096, 20_000])
def test_any_distance_is_made_of_those_that_were_measured(shared_llama: LlamaCppEngine, distance: int) -> None:
    key, rotation = torch.randn(5, 16), shared_llama._reader._model.layers[0].rotation.by(distance)
    torch.testing.assert_close(key @ rotation.mT, turned(key, distance), atol=2e-2, rtol=0)


def test_the_first_rotation_turns_nothing(shared_llama: LlamaCppEngine) -> None:
    assert torch.equal(rotations_of(shared_llama)[0][0], torch.eye(16))


def test_queries_that_do_more_than_turn_are_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the halves are said to turn together, where llama.cpp turns neighbours."""
    halves = torch.arange(8), torch.arange(8, 16)
    monkeypatch.setattr(rotation_module, "_pairs", lambda *_: halves)
    with pytest.raises(UnsupportedModel, match="layer 0 change with their position by more than a turn"):
        LlamaCppEngine(tiny_gguf)
