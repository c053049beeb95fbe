"""Decodes tokens to text as they are generated: never half a character, never the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    Text is returned once no later token can change it. The bytes of an unfinished character are held back, and so is
    text that may be the beginning of a stop text.

    Args:
        decode: returns the text of token ids.
        stop: texts that end the stream; they are not returned, nor is the text behind them.

    Attributes:
        is_stopped: whether a stop text was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [_Begun(text) for text in stop if text]
        self._tokens: list[int] = []  # one token of context, then the tokens whose text is not returned yet
        self._context = ""  # the text of the context
        self._held = ""  # complete characters that may begin a stop text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; return the text that no later token can change."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._context) :]
        self._tokens = self._tokens[-1:]
        self._context = self._decode(self._tokens)
        return self._release(new)

    def finish(self) -> str:
        """End the stream; return the text that was held back."""
        new = self._decode(self._tokens)[len(self._context) :]
        self._tokens, self._context = [], ""
        text = self._release(new) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + new
        ends = [(stop, end) for stop in self._stop if (end := stop.end_in(new)) is not None]
        if ends:
            begin = min(len(self._held) + end - len(stop.text) for stop, end in ends)
            self.is_stopped, self._held = True, ""
            return text[:begin]
        keep = max((stop.length for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`."""
    begun = _Begun(stop)
    begun.end_in(text[max(len(text) - len(stop) + 1, 0) :])
    return begun.length


class _Begun:
    """Finds one text in a stream of characters, looking at each character once (Knuth, Morris and Pratt).

    Attributes:
        length: how many characters of the text's beginning the stream ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = _borders(text)

    def end_in(self, new: str) -> int | None:
        """Add characters; return the position in them behind the text, or None while it is not complete."""
        for end, character in enumerate(new, 1):
            while self.length and self.text[self.length] != character:
                self.length = self._borders[self.length - 1]
            self.length += self.text[self.length] == character
            if self.length == len(self.text):
                return end
        return None


@lru_cache(64)
def _borders(text: str) -> list[int]:
    """For each prefix of a text, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return borders
