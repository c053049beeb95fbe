"""Token ids of a text in which nothing may be read as an added token, such as `<|im_end|>`."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def encode_as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text within a chat, as if the tokenizer had no added tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    words = [text]
    if backend.pre_tokenizer is not None:
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words if word for token in backend.model.tokenize(word)]
