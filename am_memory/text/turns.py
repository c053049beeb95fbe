"""Where each message ends in what a chat template wrote for many.

A template is asked for the end of a conversation, not for a place in its midst, and to ask it for each beginning of a
long one would cost the square of its messages. So each message is rendered behind a few others alone, and what the
template writes for it there is looked for where the message before it ended. Knows no tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

from am_memory.engines.base import Message
from am_memory.errors import InvalidInput
from am_memory.text.chat_template import Chat

MAX_TOGETHER = 32
"""Messages that a template may write in one piece (the results of several tool calls); with more of them in a row,
the rest is not told apart."""

MAX_OPENING = 3
"""Messages of the system that each of the others is rendered behind."""


def split_turns(chat: Chat, count: int, text: str) -> list[str]:
    """What the template writes for each message of a chat but the first `count`.

    Args:
        text: what it writes for all of these, behind the first ones.

    Returns:
        Texts that make up `text`. Where the template writes a message in another way once others follow, its text is
        empty, and part of the one of the message that ends what it writes together.
    """
    messages = chat.messages
    turns: list[str] = []
    opening = _num_opening(messages)
    first = count  # of the messages that are not told apart yet
    previous = max(count - 1, 0)  # the first of those that they follow
    done = 0
    for end in range(count + 1, len(messages)):
        is_near = end - first <= MAX_TOGETHER
        pieces = _pieces(chat, opening, previous, first, end) if is_near else iter(())
        turn = next((piece for piece in pieces if piece and text.startswith(piece, done)), "")
        if turn:
            done += len(turn)
            previous, first = first, end
        turns.append(turn)
    return [*turns, text[done:]] if len(messages) > count else []


def _num_opening(messages: Sequence[Message]) -> int:
    """How many messages open a conversation: the system's, and the first one behind them."""
    is_system = (message["role"] in ("system", "developer") for message in messages[:MAX_OPENING])
    return sum(itertools.takewhile(bool, is_system)) + 1


def _pieces(chat: Chat, opening: int, previous: int, first: int, end: int) -> Iterator[str]:
    """What the template writes for the messages from `first` to `end`, behind several short conversations."""
    messages = chat.messages
    opening = min(opening, first)
    begun = [*messages[:opening]]
    if opening < previous:  # what it says is of no matter here, and may be long
        begun = [{**message, "content": "0"} for message in begun]
    for context in ([*begun, *messages[max(previous, opening) : first]], begun):
        write = partial(chat.write, has_tools=first <= opening)
        try:
            begin = write(context) if context else ""
            whole = write([*context, *messages[first:end]])
        except InvalidInput:  # of a template that insists on an order
            continue
        if whole.startswith(begin):
            yield whole[len(begin) :]
