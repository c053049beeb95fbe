"""Loads a model by name with transformers, wherever its files are. Knows nothing of caches, engines or sessions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from am_memory.engines.model_files import find_model
from am_memory.engines.transformers.gguf_conversion import find_conversion, load_gguf
from am_memory.engines.transformers.pretrained import LoadedModel, load_pretrained
from am_memory.errors import InvalidInput, ModelNotFound


def load_model(
    model: str | os.PathLike[str],
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        model: "demo" (the bundled model), a hub id, a folder that transformers can load, or a .gguf file.
        device: None takes CUDA if there is one, else the CPU.
        dtype: None takes bfloat16 on CUDA, float32 elsewhere.
        trust_remote_code: run the code that comes with the model, if transformers does not have the model.

    Raises:
        ModelNotFound: the path has no readable model, or the hub does not provide it.
        UnsupportedModel: transformers cannot run it as a causal language model.
        InvalidInput: torch does not have the device.
    """
    place = _device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    source = find_model(model)
    if isinstance(source, str):
        loaded, tokenizer = load_pretrained(source, place, dtype, trust_remote_code)
    else:
        with _no_progress_bars():
            loaded, tokenizer = _load_path(source, place, dtype, trust_remote_code)
    return loaded.requires_grad_(False), tokenizer


def needs_conversion(model: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> bool:
    """Whether loading this model first converts a GGUF file, which takes from half a minute to a few minutes."""
    source = find_model(model)
    return isinstance(source, Path) and source.is_file() and find_conversion(source, dtype) is None


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"torch does not know a device {device!r}: use 'cpu' or 'cuda'") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch sees no CUDA device here; use device='cpu'")
    return place


def _load_path(path: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    if path.is_file():
        return load_gguf(path, device, dtype)
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} has no config.json: give a folder that save_pretrained() wrote, or a .gguf file")
    return load_pretrained(str(path), device, dtype, trust_remote_code)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
