"""Token ids to text as they come: never half a character, never the beginning of a stop text.

Counting the tokens of texts is the work of `am_memory.token_counts`; its names can be had from here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from am_memory.token_counts import ByteLevelCounter, EstimateCounter, TokenCounter, TokenizerCounter, tiktoken_counter

__all__ = [
    "REPLACEMENT",
    "ByteLevelCounter",
    "EstimateCounter",
    "TextStream",
    "TokenCounter",
    "TokenizerCounter",
    "overlap",
    "tiktoken_counter",
]

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
        self._stop = [text for text in stop if text]
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
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
