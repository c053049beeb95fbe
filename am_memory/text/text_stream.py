"""Token ids to text as they come: never half a character, never the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes a growing list of tokens piece by piece.

    A piece is given out once no later token can change it: bytes of an unfinished character are held back, and so is
    text that may turn out to be the beginning of a stop text.

    Args:
        decode: token ids to text.
        stop: texts that end the stream; neither they nor what follows is given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = [_Begun(text) for text in stop if text]
        self._tokens: list[int] = []  # since the last point where the text was whole, with one token of context
        self._context = ""  # the text of the context alone
        self._held = ""  # whole text that may begin a stop text
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is now certain."""
        self._tokens.append(token_id)
        text = self._decode(self._tokens)
        if text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._context) :]
        self._tokens = self._tokens[-1:]
        self._context = self._decode(self._tokens)
        return self._release(new)

    def finish(self) -> str:
        """What was held back: the stream has ended."""
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
    """Length of the longest end of `text` that begins `stop`."""
    begun = _Begun(stop)
    begun.end_in(text[max(len(text) - len(stop) + 1, 0) :])
    return begun.length


class _Begun:
    """How much of a text what has come so far ends with; what comes is looked at once, however much has begun.

    Attributes:
        length: of the beginning of `text` that it ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0
        self._borders = _borders(text)

    def end_in(self, new: str) -> int | None:
        """Take what comes next; where the text is complete in it, the place behind it."""
        for end, character in enumerate(new, 1):
            while self.length and self.text[self.length] != character:
                self.length = self._borders[self.length - 1]
            self.length += self.text[self.length] == character
            if self.length == len(self.text):
                return end
        return None


@lru_cache(64)
def _borders(text: str) -> list[int]:
    """For each beginning of a text, the longest shorter one that it ends with (as Knuth, Morris and Pratt have it)."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return borders
