"""A context driven by tokens, as sessions drive theirs."""

from __future__ import annotations

import random

from am_memory.context import Context


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def read(context: Context, token_ids: list[int]) -> None:
    """What `Session.append` does."""
    with context.transaction():
        context.check(token_ids)
        context.tokens.extend(token_ids)
        context.read(len(context.tokens) - 1)


def write(context: Context, count: int) -> None:
    """What `Session.generate` does, greedily."""
    for _ in range(count):
        with context.transaction():
            context.tokens.append(int(context.next_logits().argmax()))
