"""What tells tokenizers and chat templates from others, for sessions that are saved under one and read under another.

A tokenizer is what its tokens are and what texts it makes of them: the vocabulary with its merges or scores, what was
added, and how it encodes a few texts. That is not how a package writes it down, which changes with its versions, while
the saved tokens mean what they did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256

from transformers import PreTrainedTokenizerBase

PROBES = (
    'The quick brown fox jumps over the lazy dog; isn\'t it "strange"?',
    "  two spaces, a\ttab,\n\n\nthree lines and   more \r\n",
    "1234567890 3.14159 2026-02-16 0xff 1,000,000",
    "def f(x):\n        return {x: [y ** 2 for y in x]}  # ok",
    "Zürich, naïve, Ångström, ΑΒΓ, привет, שלום, مرحبا, नमस्ते",
    "東京 한국어 สวัสดี 🦉👩‍👩‍👧 e\u0301 ﬁ ½ \u00a0\u200b",
)
"""What a tokenizer splits, normalises and spells out in ways of its own."""


def tokenizer_fingerprint(tokens: Iterable[object], encode: Callable[[str, bool], Sequence[int]]) -> str:
    """A short hash, equal for two tokenizers if tokens of one are those of the other, and texts become the same.

    Args:
        tokens: all of the vocabulary, as JSON can hold it.
        encode: a text to token ids, the second argument being whether with what stands at the start of a text.
    """
    return _digest([*tokens, *([encode(text, add_special) for text in PROBES] for add_special in (False, True))])


def template_fingerprint(template: object, special: Mapping[str, str | None]) -> str:
    """A short hash of a chat template and of the texts that it writes of its own accord; "" where there is none.

    Args:
        template: its text, or several by their names.
        special: of its variables, what starts and what ends a text.
    """
    return _digest([template, dict(special)]) if template else ""


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of a tokenizer of transformers."""

    def encode(text: str, add_special: bool) -> list[int]:
        try:
            return list(tokenizer(text, add_special_tokens=add_special, verbose=False)["input_ids"])
        except Exception:  # tokenizers raise just that for a text that they cannot encode
            return []

    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    added = sorted((index, token.content, token.special) for index, token in tokenizer.added_tokens_decoder.items())
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return tokenizer_fingerprint([vocabulary, added, ends, _learned(tokenizer)], encode)


def of_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The fingerprint of the chat template of a tokenizer of transformers."""
    return template_fingerprint(tokenizer.chat_template, {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token})


def _learned(tokenizer: PreTrainedTokenizerBase) -> list[object]:
    """What a tokenizer joins first: merges in their order, or what each token scores."""
    if not tokenizer.is_fast:
        return []
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Older versions write a merge as one text.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    return [merges, model["vocab"] if isinstance(model["vocab"], list) else []]


def _digest(parts: Sequence[object]) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
