"""What is refused, by name: models whose cache is another thing, packages that are not the pinned one, odd layouts."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_file import write_gguf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp import library as library_module
from am_memory.engines.llama_cpp.capture import Attention
from am_memory.engines.llama_cpp.layout import GGMLTensor
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.llama_cpp.state import SequenceState
from am_memory.errors import UnsupportedModel


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """As in a process that has not loaded it yet."""
    library_module.library.cache_clear()
    yield
    library_module.library.cache_clear()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention__kv_lora_rank", 8, "caches a latent vector"),
        ("attn_logit_softcapping", 30.0, "caps its attention scores"),
        ("attention__causal", False, "does not attend causally"),
        ("attention__max_alibi_bias", 8.0, "ALiBi"),
        ("rope__scaling__type", "longrope", "longrope"),
    ],
)
def test_a_model_of_another_attention_is_refused(
    tiny_model: PreTrainedModel,
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    key: str,
    value: float | bool | str,
    reason: str,
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny_model, byte_tokenizer, **{key: value})
    with pytest.raises(UnsupportedModel, match=rf"tiny \(llama\) .*{reason}.*; use a decoder-only model"):
        LlamaCppEngine(path)


@pytest.mark.parametrize(
    ("function", "result", "reason"),
    [
        ("llama_model_has_encoder", True, "is an encoder-decoder model"),
        ("llama_model_is_recurrent", True, "is recurrent"),
        ("llama_model_is_hybrid", True, "is a hybrid"),
        ("llama_model_is_diffusion", True, "does not attend causally"),
        ("llama_model_rope_type", 8, "uses M-RoPE"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, function: str, result: object, reason: str
) -> None:
    """llama.cpp says what a model is; it would take one of each kind to have it say so by itself."""
    monkeypatch.setattr(library(), function, lambda model: result)
    with pytest.raises(UnsupportedModel, match=reason):
        LlamaCppEngine(tiny_gguf)


def test_a_table_of_positions_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """llama.cpp ends the process at a position past it, and how queries turn is tried at position 4,096."""
    writer = gguf.GGUFWriter(tmp_path / "gpt2.gguf", "gpt2")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.add_tensor("position_embd.weight", np.zeros((1024, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"learned positions, for 1,024 tokens only"):
        LlamaCppEngine(tmp_path / "gpt2.gguf")


def test_an_older_version_of_the_package_is_refused(
    fresh_library: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.9")
    with pytest.raises(
        UnsupportedModel, match=r"llama-cpp-python is 0\.3\.9, .* pip install llama-cpp-python==0\.3\.36"
    ):
        LlamaCppEngine(tiny_gguf)


def test_a_newer_version_is_taken_and_said_to_be_untested(
    fresh_library: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.3.100+cu124")
    LlamaCppEngine(tiny_gguf)
    assert "0.3.100+cu124 is newer than 0.3.36" in caplog.text


def test_tensors_of_another_layout_are_found_out(
    fresh_library: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing into them would destroy other memory."""

    class Reordered(ctypes.Structure):
        _fields_ = tuple(sorted(GGMLTensor._fields_, key=lambda field: field[0] == "data"))

    monkeypatch.setattr("am_memory.engines.llama_cpp.layout.GGMLTensor", Reordered)
    with pytest.raises(UnsupportedModel, match=r"lays out its tensors in another way \(name\)"):
        LlamaCppEngine(tiny_gguf)


def test_a_missing_package_is_named(fresh_library: None, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(UnsupportedModel, match=r"needs llama-cpp-python 0\.3\.36 .*pip install"):
        LlamaCppEngine(tiny_gguf)


def test_a_kernel_that_scores_otherwise_is_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would be if another version put the queries elsewhere."""
    queries = Attention.grouped_query.fget
    monkeypatch.setattr(Attention, "grouped_query", property(lambda attention: queries(attention).flip(1)))
    with pytest.raises(UnsupportedModel, match="layer 0: attention from queries and keys is off by"):
        LlamaCppEngine(tiny_gguf)


def test_a_state_of_another_layout_is_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = SequenceState.pack
    monkeypatch.setattr(SequenceState, "pack", lambda state: np.append(pack(state), np.uint8(0)))
    with pytest.raises(UnsupportedModel, match="a state that was read and rebuilt is not the same bytes"):
        LlamaCppEngine(tiny_gguf)


def test_keys_that_are_not_the_graphs_are_found_out(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from am_memory.engines.llama_cpp.state import Column

    tensor = Column.tensor
    monkeypatch.setattr(Column, "tensor", lambda column, num_heads: tensor(column, num_heads) + torch.ones(()))
    with pytest.raises(UnsupportedModel, match="layer 0: the state's keys"):
        LlamaCppEngine(tiny_gguf)
