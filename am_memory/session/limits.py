"""The limits of a model: its vocabulary, and the positions that it has. Knows no session."""

from __future__ import annotations

from collections.abc import Sequence

from am_memory.engines.base import ModelInfo
from am_memory.errors import InvalidInput, PromptTooLong


def require_token_ids(info: ModelInfo, token_ids: Sequence[int]) -> None:
    """Raise InvalidInput for ids outside the vocabulary."""
    for position, token_id in enumerate(token_ids):
        if not isinstance(token_id, int) or not 0 <= token_id < info.vocab_size:
            raise InvalidInput(
                f"token id {token_id!r} at position {position} is outside the vocabulary of {info.vocab_size}; encode "
                "the text with the model's own tokenizer"
            )


def require_positions(info: ModelInfo, num_tokens: int) -> None:
    """Raise PromptTooLong if the model has no positions for so many tokens."""
    if info.max_tokens is not None and num_tokens > info.max_tokens:
        raise PromptTooLong(
            f"{num_tokens:,} tokens are more than the {info.max_tokens:,} for which {info.name} has positions: rewind, "
            "begin a new session, or use a model with RoPE"
        )


def limit_new_tokens(info: ModelInfo, num_tokens: int, max_new_tokens: int) -> int:
    """At most `max_new_tokens`, and no more than the model has positions for behind `num_tokens` tokens.

    Raises:
        PromptTooLong: there is no position for even one.
    """
    require_positions(info, num_tokens)
    if info.max_tokens is None:
        return max_new_tokens
    return min(max_new_tokens, info.max_tokens - num_tokens + 1)  # no token is read after the last one
