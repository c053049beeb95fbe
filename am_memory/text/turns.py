"""Splits a rendered conversation into the text of each message.

A template renders whole conversations. Rendering every prefix of a long one would take time that grows with the square
of its messages. So each message is rendered behind a few others only, and its text is searched for where the message
before it ended. Knows no tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

from am_memory.engines.base import Message
from am_memory.errors import InvalidInput
from am_memory.text.chat_template import RenderedChat

MAX_TOGETHER = 32
"""The most messages that a template may write as one piece, such as the results of several tool calls; if there are
more in a row, the rest is not split."""

MAX_OPENING = 3
"""The most system messages at the start of a conversation that every other message is rendered behind."""


def split_turns(chat: RenderedChat, count: int, text: str) -> list[str]:
    """Split the text of all messages but the first `count` into one text a message.

    Args:
        text: what the template writes for these messages, behind the first ones.

    Returns:
        Texts that make up `text`. A template may write several messages as one piece; then the last of them has the
        text of all, and the others have "".
    """
    messages = chat.messages
    turns: list[str] = []
    opening = _num_opening(messages)
    first = count  # the first message that is not split off yet
    previous = max(count - 1, 0)  # the first of the messages before it that are rendered with it
    done = 0  # characters of the text
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
    """How many messages open a conversation: the system messages and the first message behind them."""
    is_system = (message["role"] in ("system", "developer") for message in messages[:MAX_OPENING])
    return sum(itertools.takewhile(bool, is_system)) + 1


def _pieces(chat: RenderedChat, opening: int, previous: int, first: int, end: int) -> Iterator[str]:
    """Render the messages from `first` to `end` behind two different short conversations."""
    messages = chat.messages
    opening = min(opening, first)
    begun = [*messages[:opening]]
    if opening < previous:  # the content of the opening may be long, and does not matter here
        begun = [{**message, "content": "0"} for message in begun]
    for context in ([*begun, *messages[max(previous, opening) : first]], begun):
        write = partial(chat.write, has_tools=first <= opening)
        try:
            begin = write(context) if context else ""
            whole = write([*context, *messages[first:end]])
        except InvalidInput:  # the template demands another order of roles
            continue
        if whole.startswith(begin):
            yield whole[len(begin) :]
