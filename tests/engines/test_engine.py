"""The transformers engine itself: what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from am_memory.engines.transformers import TransformersEngine


def test_it_says_what_it_runs_in_one_line(engine: TransformersEngine) -> None:
    assert repr(engine) == "<TransformersEngine: LlamaForCausalLM on cpu, context window of 4,096 tokens, float32>"


def test_it_reads_less_at_once_on_a_cpu(engine: TransformersEngine) -> None:
    assert engine.chunk_tokens == 512


def test_a_folders_path_is_no_name(engine: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repr of a memory, and errors that a server sends, showed where this machine keeps its models."""
    folder = tmp_path / "owl-7b"
    folder.mkdir()
    monkeypatch.setattr(engine.model.config, "name_or_path", str(folder))
    assert TransformersEngine(engine.model, engine.tokenizer).info.name == "owl-7b"
