"""Makes a tiktoken encoding from a transformers tokenizer with byte-level BPE. Knows no counts and no engines.

The two libraries read one vocabulary in different ways. `tokenizers` merges pairs in the order of a list; tiktoken
merges any neighbours whose bytes are a token, the lowest id first. They agree on every text if the ids of merged tokens
ascend with the list, and if the list builds every token from its bytes. Both are checked for each token. The regex
engines that split a text into words differ as well; they are compared on sample texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import tiktoken
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from am_memory.errors import UnsupportedOperation

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # GPT-2's, between numbers
_WHOLE = r"[\s\S]+"

Tokenizer = Mapping[str, Any]
"""The content of a `tokenizer.json`, or a part of it."""


class ByteLevelEncoding:
    """The vocabulary of a tokenizer, for tiktoken.

    Attributes:
        encoding: gives the tokenizer's ids with `allowed_special="all"`, for a text without `missing_bytes`, which must
            be in NFC if `needs_nfc`.
        missing_bytes: bytes that the vocabulary lacks.
        needs_nfc: whether the tokenizer normalises text to NFC, which tiktoken cannot do.

    Raises:
        UnsupportedOperation: tiktoken cannot reproduce this tokenizer; the message says why.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise _unsupported(f"it is a {type(tokenizer).__name__}, not a fast tokenizer of transformers")
        content: Tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())
        self.needs_nfc = _needs_nfc(content["normalizer"])
        pattern = _pattern(content["pre_tokenizer"])
        special = _added_tokens(content["added_tokens"])
        ranks = _mergeable_ranks(content["model"])
        self.missing_bytes = frozenset(byte for byte in range(256) if bytes([byte]) not in ranks)
        first_free = max(*content["model"]["vocab"].values(), *special.values()) + 1
        missing = {bytes([byte]): first_free + index for index, byte in enumerate(sorted(self.missing_bytes))}
        try:
            self.encoding = tiktoken.Encoding(
                str(tokenizer.name_or_path) or "local",
                pat_str=pattern,
                mergeable_ranks=ranks | missing,  # tiktoken needs a token for every byte
                special_tokens=special,
            )
        except ValueError as error:
            raise _unsupported(f"tiktoken does not take its pattern {pattern!r}: {error}") from error


def _unsupported(reason: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"tiktoken cannot stand in for this tokenizer: {reason}; count with TokenizerCounter(memory.tokenize)"
    )


def _needs_nfc(normalizer: Tokenizer | None) -> bool:
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unsupported(f"it changes the text before splitting it ({normalizer['type']})")
    return normalizer is not None


def _pattern(pre_tokenizer: Tokenizer | None) -> str:
    """A regex that matches the words into which the tokenizer splits a text."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer] if pre_tokenizer else [])
    match [(step["type"], step) for step in steps]:
        case [*before, ("ByteLevel", {"add_prefix_space": False, "use_regex": splits})]:
            pass
        case _:
            raise _unsupported(f"it does not split as byte-level BPE does ({pre_tokenizer})")
    match before:
        case []:
            return _GPT2 if splits else _WHOLE
        case [("Digits", {"individual_digits": is_each})] if splits:
            return rf"\p{{N}}{'' if is_each else '+'}|{_WORDS}"
        case [("Split", {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})] if not splits:
            return rf"{regex}|(?:(?!{regex})[\s\S])+"  # text between matches is a word, too
        case _:
            raise _unsupported(f"it splits in more steps than one regex can express ({pre_tokenizer})")


def _added_tokens(added: Sequence[Tokenizer]) -> dict[str, int]:
    """The tokens that are searched for in a text before it is split."""
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _unsupported(f"its token {token['content']!r} depends on the characters around it")
    if len({token["normalized"] for token in added}) > 1:
        raise _unsupported("some of its added tokens are found before others")
    for first, second in pairwise(sorted(str(token["content"]) for token in added)):
        if second.startswith(first):
            raise _unsupported(f"its added token {first!r} begins {second!r}, and tiktoken may find either")
    return {token["content"]: token["id"] for token in added}


def _mergeable_ranks(model: Tokenizer) -> dict[bytes, int]:
    """The tokens that merging can build, by their bytes.

    With `ignore_merges`, a word that is a token becomes that token, whatever merging would build. tiktoken always does
    this. It makes no difference for tokens that merging builds; without `ignore_merges` the others are left out.
    """
    if model["type"] != "BPE":
        raise _unsupported(f"its vocabulary is not BPE but {model['type']}")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model[field]:
            raise _unsupported(f"its BPE has {field}={model[field]!r}")
    vocab: dict[str, int] = model["vocab"]
    merged = [vocab[left + right] for left, right in model["merges"]]
    if any(later < earlier for earlier, later in pairwise(merged)):
        raise _unsupported("the ids of its tokens are not in the order of its merges")
    bpe = BPE(vocab=vocab, merges=[(left, right) for left, right in model["merges"]])
    ranks = {}
    for token, token_id in vocab.items():
        if not token or not _BYTE_OF.keys() >= set(token):
            continue
        parts = [part.id for part in bpe.tokenize(token)]
        if parts == [token_id] or model["ignore_merges"]:
            ranks[bytes(_BYTE_OF[character] for character in token)] = token_id
        if parts != [token_id] and model["ignore_merges"] and len(parts) == 2:
            raise _unsupported(f"its merges do not build the token {token!r}, but its two halves")
    return ranks
