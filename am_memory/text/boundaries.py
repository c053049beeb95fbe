"""Where a block of tokens ends best: behind a message, else a line, else a sentence, else a word.

A fact that is cut in two is held by neither half: a model that repeats the second one does not know what the number is
of that it begins with. Looks at tokens alone, so that it serves chat, plain text and `generate()` alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from am_memory.engines.base import Engine

INSIDE, WORD, SENTENCE, LINE, MESSAGE = range(5)


def best_boundary(engine: Engine, token_ids: Sequence[int], earliest: int, latest: int) -> int:
    """The last of the strongest boundaries among the positions `earliest` to `latest`, both included.

    Args:
        token_ids: a boundary at position n stands between token n - 1 and token n; there must be a token `latest`.
    """
    return max(range(earliest, latest + 1), key=lambda position: (_strength(engine, token_ids, position), position))


def _strength(engine: Engine, token_ids: Sequence[int], position: int) -> int:
    before, after = token_ids[position - 1], token_ids[position]
    first = engine.decode([before])
    second = engine.decode([before, after]).removeprefix(first)
    # Chat templates put a line break, if anything, between the end of one message and the beginning of the next.
    ends = engine.info.eos_token_ids
    is_behind_break = not first.strip() and position > 1 and token_ids[position - 2] in ends
    if (before in ends and second.strip()) or is_behind_break:
        return MESSAGE
    if first.endswith("\n"):
        return LINE
    if not second[:1].isspace():
        return INSIDE
    return SENTENCE if first.rstrip("\"')]*").endswith((".", "!", "?", ":", "。")) else WORD
