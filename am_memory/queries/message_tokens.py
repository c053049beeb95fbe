"""The tokens of a chat's messages, without the headers and marks that the chat template puts between them.

A model that reads the next speaker's header stops repeating and continues the chat. The headers are therefore left out
of the tokens that it repeats; they stay in the cache, and are compacted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from am_memory.engines.base import Engine
from am_memory.text.chat_template import RenderedChat


def message_token_positions(engine: Engine, token_ids: Sequence[int], start: int, end: int) -> list[int]:
    """The positions of a block whose tokens belong to messages.

    A separator that ends in white space keeps its last token, so that two messages stay apart.

    Args:
        token_ids: of the whole conversation; the block is `token_ids[start:end]`.

    Returns:
        Rising positions in [start, end); all of them if the block holds no message token.
    """
    separators = _separators(engine)
    marks = {token_id for token_id in set(token_ids[start:end]) if _is_special(engine, token_id)}
    longest = max(map(len, separators), default=0)
    left_out: set[int] = set()
    for first in range(max(start - longest, 0), end):
        for separator in separators:
            last = first + len(separator) - 1
            if list(token_ids[first : last + 1]) == separator:
                ends_in_space = not engine.decode(separator[-1:]).strip()
                left_out.update(range(first, last if ends_in_space else last + 1))
    kept = [position for position in range(start, end) if position not in left_out]
    return [position for position in kept if token_ids[position] not in marks] or list(range(start, end))


def _separators(engine: Engine) -> list[list[int]]:
    """Token ids that the chat template writes between a user's message and the model's, and the other way round."""
    if not engine.has_chat_template:
        return []
    chat = RenderedChat(engine, [{"role": role, "content": "0"} for role in ("user", "assistant", "user")])
    behind = [chat.write_behind(chat.messages, index) for index in range(3)]
    return [engine.encode(text.removesuffix(f"0{later}")) for text, later in pairwise(behind)]


def _is_special(engine: Engine, token_id: int) -> bool:
    return engine.decode([token_id], skip_special=True) == "" != engine.decode([token_id])
