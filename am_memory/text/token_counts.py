"""Counts the tokens of texts: exactly for the loaded model, by an estimate for others. Knows no sessions.

`TokenizerCounter` uses the model's tokenizer. `ByteLevelCounter` gives the same numbers several times faster, for long
texts such as tool results. `tiktoken_counter` gives an estimate for models that run elsewhere.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

import tiktoken
from transformers import PreTrainedTokenizerBase

from am_memory.errors import EncodingNotFound, UnsupportedOperation
from am_memory.text.byte_level import ByteLevelEncoding

CHECKED_TEXTS = (
    "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # 100%\n\n\nclass A:\r\n    pass\r\n",
    '{"id": 1234567890, "pi": 3.14159, "n": -1e-07, "list": [1, 22, 333, 4444], "url": "https://a.b/c?d=e&f=%20"}',
    "It's we're I'VE they'Ll o'clock 'S 'ſ don't'd'm 'tis 's",
    "猫が好きです。日本語と中文，한국어。 Ελλάδα Привет שלום مرحبا ภาษาไทย हिन्दी naïve Straße ǅ ﬁ",
    "👍🏽 👩‍🚀🇪🇺 ❤️\u200d🔥 \U0001f9ff\u2028\u2029\ufeff\ufffd\ue000",
    "  two   three    four \t tab \t\t\n \n\n \n   end   ",
    "\n", " ", "\r\n\r\n", "   \n  x", "a \u3000 b\u00a0c\u2003\u0085d\u200b\x0b\x0c\x1c\x1f\x7f",
    "1 12 123 1234 12345 1,234.50 ½ ² ٣٤ Ⅷ 五 １２ x1y22z", "  1  22 a 3 \n4",
    "e\u0301 \u1100\u1161 \u212b \u0958",
    "<|im_start|>user\n<|endoftext|><s></s>[INST]<tool_call>\n</tool_call><|im_end|",
    "the\nthe", "\x00\x01\x04\x1b[31mred\x1b[0m",
)  # fmt: skip
"""Texts that tokenizers may split differently: code, data, contractions, scripts, emoji, spaces, numbers, marks."""

CHUNK_CHARACTERS = 100_000


class TokenCounter(Protocol):
    """Counts the tokens of texts, for one model."""

    @property
    def is_exact(self) -> bool:
        """Whether the model reads exactly this many tokens; otherwise the count is an estimate."""
        ...

    def count(self, text: str) -> int:
        """Count the tokens of a text, without special tokens added; marks such as `<|im_end|>` are one token each."""
        ...


class TokenizerCounter:
    """Counts exactly, with the model's own tokenizer.

    Args:
        encode: returns the token ids of a text: `memory.tokenize`, or an engine's `encode`.
    """

    is_exact = True

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode

    def count(self, text: str) -> int:
        return len(self._encode(text))


class ByteLevelCounter:
    """Counts exactly, with tiktoken, for byte-level BPE tokenizers (Qwen, Llama 3, SmolLM, GPT-2).

    Building it takes one to four seconds. A text goes through the slower tokenizer if tiktoken might differ or fail:

    - the text is not in the normal form that the tokenizer produces;
    - it has characters that the vocabulary cannot spell;
    - it has characters unknown to Python's version of Unicode, which other versions may call letters;
    - it has a run of hundreds of thousands of spaces.

    Args:
        tokenizer: the model's tokenizer.

    Raises:
        UnsupportedOperation: tiktoken cannot reproduce this tokenizer's ids; the message names a text that differs.
    """

    is_exact = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = ByteLevelEncoding(tokenizer)
        special = sorted(self.encoding.special_tokens_set)
        for text in (*CHECKED_TEXTS, *special, " a ".join(["", *special, ""]), "".join(special)):
            self._check(text)

    @property
    def encoding(self) -> tiktoken.Encoding:
        """The vocabulary for tiktoken; unlike `encode`, it does not check for the texts listed above."""
        return self._vocabulary.encoding

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """Return the tokenizer's ids of a text, without special tokens added."""
        if not self._is_plain(text):
            return self._encode_slowly(text)
        try:
            return self.encoding.encode(text, allowed_special="all")
        except ValueError:  # tiktoken's regex engine fails on a long run of spaces
            return self._encode_slowly(text)

    def _encode_slowly(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _is_plain(self, text: str) -> bool:
        missing = self._vocabulary.missing_bytes
        for character in set(text):
            if unicodedata.category(character) in ("Cn", "Cs") or not missing.isdisjoint(character.encode()):
                return False
        return not self._vocabulary.needs_nfc or unicodedata.is_normalized("NFC", text)

    def _check(self, text: str) -> None:
        ours, theirs = self.encode(text), self._encode_slowly(text)
        if ours != theirs:
            raise UnsupportedOperation(
                f"tiktoken reads {text!r} as {ours}, the tokenizer as {theirs}: "
                "count with TokenizerCounter(memory.tokenize)"
            )


class EstimateCounter:
    """Estimates the count with another model's encoding.

    Args:
        encoding: an encoding of tiktoken; marks such as `<|im_end|>` are counted as plain text.
    """

    is_exact = False

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def count(self, text: str) -> int:
        """Count in pieces, as tiktoken fails on long runs of spaces; each cut may add a token."""
        starts = range(0, len(text), CHUNK_CHARACTERS)
        return sum(len(self._encoding.encode_ordinary(text[start : start + CHUNK_CHARACTERS])) for start in starts)


def tiktoken_counter(name: str) -> EstimateCounter:
    """Make a counter that estimates with one of tiktoken's own encodings, for models that run elsewhere.

    Args:
        name: "o200k_base" (GPT-4o and later), "cl100k_base" (GPT-4), or another that tiktoken knows.

    Raises:
        EncodingNotFound: tiktoken does not know the encoding, or its file is not here and cannot be downloaded.
    """
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise EncodingNotFound(f"tiktoken has no encoding {name!r}; it has {', '.join(names)}")
    try:
        return EstimateCounter(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # no network, a server's error, a folder that cannot be written, a bad file
        raise EncodingNotFound(
            f"tiktoken's file of {name} is not on this machine and cannot be downloaded ({error}). On a machine with a "
            f"network, run TIKTOKEN_CACHE_DIR=FOLDER python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", "
            "copy FOLDER here and set TIKTOKEN_CACHE_DIR to it; or count with a local model's tokenizer"
        ) from error
