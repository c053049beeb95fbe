"""Short hashes of models, files, tokenizers and chat templates.

A saved session names those that it was made with, so that another model, tokenizer or template is noticed when the
session is resumed. A tokenizer's hash covers the vocabulary, its merges or scores, and how a few texts are encoded. It
does not cover the files of the tokenizer: another version of a package may write the same tokenizer in another way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory.errors import UnsupportedModel

PROBES = (
    'The quick brown fox jumps over the lazy dog; isn\'t it "strange"?',
    "  two spaces, a\ttab,\n\n\nthree lines and   more \r\n",
    "1234567890 3.14159 2026-02-16 0xff 1,000,000",
    "def f(x):\n        return {x: [y ** 2 for y in x]}  # ok",
    "Zürich, naïve, Ångström, ΑΒΓ, привет, שלום, مرحبا, नमस्ते",
    "東京 한국어 สวัสดี 🦉👩‍👩‍👧 e\u0301 ﬁ ½ \u00a0\u200b",
)
"""Texts that tokenizers split, normalise and spell differently."""

CONVERSION_FORMAT = 1
"""Raise it when a conversion of GGUF files writes something else: every file then gets another hash."""

CACHE_FIELDS = (
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
"""Fields of a model's configuration that change its cache."""

SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A dtype of each element size in bytes that torch can index on every device."""


def model_fingerprint(model: PreTrainedModel, *, through: object = None, without: Collection[str] = ()) -> str:
    """A short hash, equal for two models if their caches can be exchanged: same shapes, RoPE, weights and dtype.

    It reads the configuration and eight values of each weight tensor, so it takes milliseconds at any size.

    Args:
        through: description of the adapters (peft) through which the weights act; None: there are none.
        without: names of adapters that are loaded but not active.

    Raises:
        UnsupportedModel: a weight is stored in a way from which no value can be read.
    """
    config = model.config.get_text_config().to_dict()
    shape = {name: config.get(name) for name in CACHE_FIELDS}
    digest = sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_weights(model, without), key=lambda named: named[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(_sample(name, tensor.detach()))
    if through is not None:
        digest.update(repr(through).encode())
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path, num_blocks: int = 64, block_bytes: int = 65536) -> str:
    """A short hash of a file's size and of blocks from its start to its end; it takes milliseconds at any size."""
    size = path.stat().st_size
    digest = sha256(f"{CONVERSION_FORMAT} {size}".encode())
    with path.open("rb") as file:
        for i in range(num_blocks):
            file.seek(max(0, size - block_bytes) * i // (num_blocks - 1))
            digest.update(file.read(block_bytes))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokens: Iterable[object], encode: Callable[[str, bool], Sequence[int]]) -> str:
    """A short hash, equal for two tokenizers if they have the same tokens and encode texts in the same way.

    Args:
        tokens: the whole vocabulary, as JSON can hold it.
        encode: returns the token ids of a text; the second argument adds the special tokens at the start of a text.
    """
    return _digest([*tokens, *([encode(text, add_special) for text in PROBES] for add_special in (False, True))])


def template_fingerprint(template: object, special: Mapping[str, str | None]) -> str:
    """A short hash of a chat template and the special texts that it writes; "" if there is no template.

    Args:
        template: its text, or several texts by their names.
        special: the texts that start ("bos") and end ("eos") a conversation.
    """
    return _digest([template, dict(special)]) if template else ""


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer of transformers."""

    def encode(text: str, add_special: bool) -> list[int]:
        try:
            return list(tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])
        except Exception:  # tokenizers raise a bare Exception for a text that they cannot encode
            return []

    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    added = sorted((index, token.content, token.special) for index, token in tokenizer.added_tokens_decoder.items())
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return tokenizer_fingerprint([vocabulary, added, ends, _merges_and_scores(tokenizer)], encode)


def of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of the chat template of a tokenizer of transformers."""
    return template_fingerprint(tokenizer.chat_template, {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token})


def _weights(model: PreTrainedModel, without: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers by name; a quantised weight is a buffer, or consists of several tensors.

    peft wraps a layer and keeps it as `base_layer`; the wrapper's part of the name is left out.
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
    """Yield the tensors of one weight: the weight itself, unless it is quantised."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        parts, context = value.__tensor_flatten__()
        description = re.sub(" at 0x[0-9a-f]+", "", repr(context))  # addresses differ between processes
        for part in parts:
            yield from _plain_tensors(f"{name} {type(value).__name__} {description} {part}", getattr(value, part))
    elif isinstance(value, torch.Tensor) and value.is_quantized:
        yield name, value.int_repr()
        yield f"{name} dequantized", value.flatten()[:64].dequantize()
    elif isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from _plain_tensors(f"{name}.{number}", part)


def _sample(name: str, tensor: torch.Tensor) -> bytes:
    """The bytes of eight values, evenly spaced."""
    try:
        flat = tensor.flatten()
        flat = flat.view(SAME_SIZE.get(flat.element_size(), flat.dtype))
        num_values = min(8, flat.numel())
        positions = torch.tensor([i * flat.numel() // num_values for i in range(num_values)], dtype=torch.long)
        return flat[positions.to(flat.device)].cpu().view(torch.uint8).numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise UnsupportedModel(
            f"the weights of {name} are kept as {type(tensor).__name__} in {tensor.dtype}, from which no value can be "
            f"read ({error}), so that this model cannot be told from another: quantise it in another way, or not at all"
        ) from error


def _merges_and_scores(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """The merges in their order and the scores of tokens; empty for a slow tokenizer."""
    if not tokenizer.is_fast:
        return []
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Older versions write a merge as one text.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    return [merges, model["vocab"] if isinstance(model["vocab"], list) else []]


def _digest(parts: Sequence[object]) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
