"""Chooses where a block of tokens ends: behind a message, else a line, else a sentence, else a word.

If a block ends inside a fact, neither block holds the fact: the second may begin with a number, and the first has the
words that say what it counts. Only tokens are looked at, so that chats, plain text and `generate()` are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from am_memory.engines.base import Engine

INSIDE, WORD, SENTENCE, LINE, MESSAGE = range(5)


def best_boundary(engine: Engine, token_ids: Sequence[int], earliest: int, latest: int) -> int:
    """Choose the strongest boundary between two positions, both included; the last one of equal strength.

    Args:
        token_ids: position n is between token n - 1 and token n; there must be a token `latest`.
    """
    return max(range(earliest, latest + 1), key=lambda position: (_strength(engine, token_ids, position), position))


def _strength(engine: Engine, token_ids: Sequence[int], position: int) -> int:
    before, after = token_ids[position - 1], token_ids[position]
    first = engine.decode([before])
    second = engine.decode([before, after]).removeprefix(first)
    # Between two messages, chat templates put a line break or nothing.
    ends = engine.info.eos_token_ids
    is_behind_break = not first.strip() and position > 1 and token_ids[position - 2] in ends
    if (before in ends and second.strip()) or is_behind_break:
        return MESSAGE
    if first.endswith("\n"):
        return LINE
    if not second[:1].isspace():
        return INSIDE
    return SENTENCE if first.rstrip("\"')]*").endswith((".", "!", "?", ":", "。")) else WORD
