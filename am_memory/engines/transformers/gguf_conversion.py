"""Converts a GGUF file once into a folder that transformers loads in seconds.

Transformers takes half a minute to read even a small GGUF file. The conversion stores the dequantised weights, the
tokenizer and the chat template as safetensors in the user's cache folder: $AM_MEMORY_CACHE, by default `am_memory` in
the XDG cache folder. Later loads read that folder.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from am_memory.engines.fingerprints import file_fingerprint
from am_memory.engines.gguf_header import read_header, require_known_merges, require_vocabulary
from am_memory.engines.model_files import cache_folder
from am_memory.engines.transformers.pretrained import LoadedModel, complete_model, load_pretrained
from am_memory.errors import ModelNotFound, UnsupportedModel

# Vocabularies of llama.cpp whose merges were learned with every digit apart; transformers splits them as GPT-2 does.
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
DIGITS_APART_SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)

# Errors of the GGUF readers for bytes that do not match the header.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, OverflowError, NotImplementedError, struct.error)

_log = logging.getLogger(__name__)


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a GGUF file from its conversion, which is made first if there is none.

    Raises:
        ModelNotFound: the file or its conversion cannot be read.
        UnsupportedModel: the file scales its RoPE.
    """
    folder = find_conversion(path, dtype)
    if folder is None:
        folder = _conversion_folder(path, dtype)
        _log.info("converting %s, once; later loads take seconds", path)
        loaded, tokenizer = read_gguf(path, dtype)
        try:
            store_conversion(folder, loaded, tokenizer)
        except (OSError, SafetensorError) as error:
            _log.warning("%s cannot be stored in %s, so it is converted each time: %s", path, folder, error)
            return cast(Any, loaded).to(device), tokenizer
        del loaded
    loaded, tokenizer = load_pretrained(str(folder), device, dtype)
    loaded.config.name_or_path = path.stem  # the folder's name has the digest and the dtype of the conversion as well
    return loaded, tokenizer


def find_conversion(path: Path, dtype: torch.dtype) -> Path | None:
    """Find the folder of an earlier conversion; a conversion to float32 serves every dtype."""
    folders = (_conversion_folder(path, torch.float32), _conversion_folder(path, dtype))
    return next((folder for folder in folders if folder.is_dir()), None)


def _conversion_folder(path: Path, dtype: torch.dtype) -> Path:
    dtype_name = str(dtype).removeprefix("torch.")
    return cache_folder() / "models" / f"{path.stem}-{file_fingerprint(path)}-{dtype_name}"


def read_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Let transformers dequantise a GGUF file on the CPU, and remove the traces of the quantisation."""
    try:
        pre_tokenizer = _check_gguf(path)
        with contextlib.redirect_stderr(io.StringIO()):  # the loader's own progress bar has no switch
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            dequantized = GgufConfig(dequantize=True)  # safetensors cannot store quantised blocks
            loaded = complete_model(path.parent, gguf_file=path.name, dtype=dtype, quantization_config=dequantized)
    except UNREADABLE as error:
        raise ModelNotFound(f"{path} cannot be read as a GGUF model: {error}") from error
    if pre_tokenizer in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = DIGITS_APART_SPLIT
    for owner, name in (
        (loaded, "hf_quantizer"),
        (loaded, "quantization_method"),
        (loaded.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    return loaded, tokenizer


def _check_gguf(path: Path) -> str | None:
    """Refuse a file that transformers would silently read as another model; return the name of its pre-tokenizer."""
    header = read_header(path)
    require_vocabulary(header)
    require_known_merges(header)
    reader = GGUFReader(path)
    scalings = [field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")]
    factors = [tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    if any(scaling != "none" for scaling in scalings) or any((factor != 1).any() for factor in factors):
        raise UnsupportedModel(
            f"{path} scales its RoPE, which transformers does not read from GGUF files: load the original model by "
            "hub id or from a folder"
        )
    field = reader.fields.get("tokenizer.ggml.pre")
    return str(field.contents()) if field else None


def store_conversion(folder: Path, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder whole or not at all; another process may be writing the same folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        loaded.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
