"""The limits of a model: its vocabulary, its positions, and the policies that it can follow. Knows no session."""

from __future__ import annotations

from collections.abc import Sequence

from am_memory.budgets import calibration_for
from am_memory.compaction.plan import recall_tokens, require_progress, trigger_in_tokens
from am_memory.compaction.requirements import require_capabilities
from am_memory.engines.base import Engine, ModelInfo
from am_memory.errors import InvalidInput, PromptTooLong
from am_memory.policy import MemoryPolicy


def require_possible(policy: MemoryPolicy, engine: Engine) -> None:
    """Raise InvalidPolicy for a policy that no session of an engine can follow."""
    require_capabilities(policy, engine.capabilities)
    trigger_tokens = trigger_in_tokens(policy, engine.info.window_tokens)
    room = recall_room(policy, engine, trigger_tokens, policy.num_sinks)
    require_progress(policy, trigger_tokens - room, policy.num_sinks, room)
    calibration_for(policy.head_budget, engine.info)


def recall_room(policy: MemoryPolicy, engine: Engine, trigger_tokens: int, num_fixed: int) -> int:
    """The room below the trigger that is kept free for recalled pages, in tokens.

    Args:
        num_fixed: tokens and slots per KV head that no compaction makes fewer.
    """
    if engine.info.max_tokens is not None:
        return 0  # search heads are measured on a text that learned positions may not reach
    return recall_tokens(policy, engine.capabilities, trigger_tokens, num_fixed)


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
