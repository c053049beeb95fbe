"""The tokenizer and chat template of a GGUF model, run by llama.cpp. Knows no cache and no session."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer

from am_memory.engines.base import Message, Tool
from am_memory.engines.characters import utf8
from am_memory.engines.fingerprints import tokenizer_fingerprint
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.llama_cpp.source import Source
from am_memory.engines.templates import render_template


class Vocabulary:
    """Encodes text to token ids, and decodes token ids to text.

    Args:
        source: owner of the model.
    """

    def __init__(self, source: Source) -> None:
        self._lib, self._source = library(), source

    @property
    def handle(self) -> Any:
        """llama.cpp's handle of the vocabulary."""
        return self._lib.llama_model_get_vocab(self._source.model)

    def __len__(self) -> int:
        return int(self._lib.llama_vocab_n_tokens(self.handle))

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids of tokens that end a turn."""
        return frozenset(index for index in range(len(self)) if self._lib.llama_vocab_is_eog(self.handle, index))

    def encode(self, text: str, *, add_special: bool, as_text: bool = False) -> list[int]:
        data = utf8(text)
        size = len(data) + 8  # at most a token for each byte, and the special tokens around them
        tokens = (self._lib.llama_token * size)()
        count = self._lib.llama_tokenize(self.handle, data, len(data), tokens, size, add_special, not as_text)
        assert 0 <= count <= size
        return list(tokens[:count])

    def decode(self, token_ids: Sequence[int], *, skip_special: bool) -> str:
        tokens = (self._lib.llama_token * len(token_ids))(*token_ids)

        def write(buffer: Any, size: int) -> int:
            return int(
                self._lib.llama_detokenize(
                    self.handle, tokens, len(token_ids), buffer, size, skip_special, not skip_special
                )
            )

        return _written(write, 16 * len(token_ids) + 16).decode("utf-8", "replace")

    def text_of(self, token_id: int) -> str:
        """The text of a token in the vocabulary; "" for a negative id."""
        text = self._lib.llama_vocab_get_text(self.handle, token_id) if token_id >= 0 else b""
        return bytes(text or b"").decode("utf-8", "replace")

    @cached_property
    def special(self) -> dict[str, int]:
        """Control tokens and the unknown token: ids by text."""
        return self._spelled(self._lib.LLAMA_TOKEN_ATTR_CONTROL | self._lib.LLAMA_TOKEN_ATTR_UNKNOWN)

    @cached_property
    def unknown(self) -> int | None:
        """The id of the token for text that the vocabulary cannot spell; None if there is none."""
        return next(iter(self._spelled(self._lib.LLAMA_TOKEN_ATTR_UNKNOWN).values()), None)

    @cached_property
    def added(self) -> dict[str, int]:
        """Tokens that are searched for in a text before it is split: ids by text."""
        return self._spelled(self._lib.LLAMA_TOKEN_ATTR_USER_DEFINED)

    def _spelled(self, attributes: int) -> dict[str, int]:
        """Tokens with any of these attributes: ids by text."""
        ids = (index for index in range(len(self)) if self._lib.llama_vocab_get_attr(self.handle, index) & attributes)
        return {text: index for index in ids if (text := self.text_of(index))}

    @cached_property
    def chat_template(self) -> str | None:
        template = self._lib.llama_model_chat_template(self._source.model, None)
        return None if template is None else bytes(template).decode("utf-8", "replace")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        options: Mapping[str, object],
    ) -> str:
        """Render messages with the chat template, which must exist."""
        return render_template(self.chat_template or "", messages, tools, add_generation_prompt, self.ends, options)

    @cached_property
    def ends(self) -> dict[str, str]:
        """The texts that start and end a text, by the names that chat templates use."""
        return {
            "bos_token": self.text_of(self._lib.llama_vocab_bos(self.handle)),
            "eos_token": self.text_of(self._lib.llama_vocab_eos(self.handle)),
        }

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of all tokens, and of how a few texts are encoded."""
        lib, handle = self._lib, self.handle
        get_score, get_attribute = lib.llama_vocab_get_score, lib.llama_vocab_get_attr
        tokens = ((self.text_of(id), get_score(handle, id), int(get_attribute(handle, id))) for id in range(len(self)))
        return tokenizer_fingerprint(tokens, lambda text, add_special: self.encode(text, add_special=add_special))

    def grammar_tokenizer(self) -> LLTokenizer:
        """The tokenizer for grammars: tokens as bytes, and the tokens that end a turn."""
        from llguidance.llamacpp import lltokenizer_from_vocab

        with warnings.catch_warnings():  # it calls a deprecated function of llama.cpp for every token
            warnings.simplefilter("ignore", DeprecationWarning)
            return lltokenizer_from_vocab(self.handle, eos_token=sorted(self.eos_token_ids))

    def token_texts(self) -> dict[str, int]:
        """All tokens: ids by text."""
        return {self.text_of(index): index for index in range(len(self))}


def _written(write: Callable[[Any, int], int], size: int) -> bytes:
    """Call a function of llama.cpp that writes into a buffer; if it returns -size, call it again with that size."""
    for _ in range(2):
        buffer = ctypes.create_string_buffer(size)
        count = write(buffer, size)
        if count >= 0:
            return buffer.raw[:count]
        size = -count
    raise AssertionError(f"llama.cpp asked for {size} bytes twice")
