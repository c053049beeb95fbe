"""How many tokens a text is: for the model in memory exactly, for others by an estimate. Knows no sessions.

`TokenizerCounter` asks the model's tokenizer, whatever it is. `ByteLevelCounter` gives the same numbers several times
faster, for long texts such as the results of tools. `tiktoken_counter` estimates, for models that run elsewhere.
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
"""Where regex engines and vocabularies come apart: code, data, contractions, scripts, emoji, spaces, numbers, marks."""

CHUNK_CHARACTERS = 100_000


class TokenCounter(Protocol):
    """Counts the tokens of texts, for one model."""

    @property
    def is_exact(self) -> bool:
        """The model reads that many tokens; else they are an estimate."""
        ...

    def count(self, text: str) -> int:
        """Number of tokens of the text, without anything added; marks such as `<|im_end|>` are one token each."""
        ...


class TokenizerCounter:
    """Exact, by the model's own tokenizer.

    Args:
        encode: text to token ids: `memory.tokenize`, or an engine's `encode`.
    """

    is_exact = True

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode

    def count(self, text: str) -> int:
        return len(self._encode(text))


class ByteLevelCounter:
    """Exact, by tiktoken, for tokenizers of byte-level BPE (those of Qwen, Llama 3, SmolLM and GPT-2).

    It takes one to four seconds to build. A text goes through the tokenizer itself where tiktoken might differ or
    fail: it is not in the normal form that the tokenizer brings it to, it has characters that the vocabulary cannot
    spell or that Python's Unicode does not know (other versions of Unicode may call them letters), or it has
    a run of hundreds of thousands of spaces.

    Args:
        tokenizer: the model's.

    Raises:
        UnsupportedOperation: tiktoken cannot give this tokenizer's ids; if that shows on a text only, it is named.
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
        """The vocabulary as tiktoken has it; it lacks the care that `encode` takes with the texts named above."""
        return self._vocabulary.encoding

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids of the text, without anything added."""
        if not self._is_plain(text):
            return self._encode_slowly(text)
        try:
            return self.encoding.encode(text, allowed_special="all")
        except ValueError:  # the regex engine gives up on a long run of spaces
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
    """An estimate, by another model's encoding.

    Args:
        encoding: of tiktoken; marks are counted as the plain text that they are to other models.
    """

    is_exact = False

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def count(self, text: str) -> int:
        """Number of tokens, read in pieces: tiktoken gives up on long runs of spaces; each cut may add a token."""
        starts = range(0, len(text), CHUNK_CHARACTERS)
        return sum(len(self._encoding.encode_ordinary(text[start : start + CHUNK_CHARACTERS])) for start in starts)


def tiktoken_counter(name: str) -> EstimateCounter:
    """An estimate for models that run elsewhere, by one of tiktoken's own encodings.

    Args:
        name: "o200k_base" (GPT-4o and later), "cl100k_base" (GPT-4), or another that tiktoken knows.

    Raises:
        EncodingNotFound: tiktoken does not know it, or its file is neither on this machine nor to be had.
    """
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise EncodingNotFound(f"tiktoken has no encoding {name!r}; it has {', '.join(names)}")
    try:
        return EstimateCounter(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # no network, a server's error, a folder that cannot be written, a bad file
        raise EncodingNotFound(
            f"tiktoken's file of {name} is not on this machine and cannot be downloaded ({error}). Where there is a "
            f"network, run TIKTOKEN_CACHE_DIR=FOLDER python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", "
            "copy FOLDER here and set TIKTOKEN_CACHE_DIR to it; or count with a local model's tokenizer"
        ) from error
