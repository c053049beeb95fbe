"""The reasoning that an answer opens with, `<think>...</think>`, apart from the answer itself. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass

from am_memory.text.text_stream import overlap

THINK, END_OF_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Reasoning:
    """A part of the reasoning, without its tags."""

    text: str


def is_reasoning(text: str) -> bool:
    """Whether a text ends inside of reasoning: it has a `<think>` that no `</think>` follows."""
    return text.rfind(THINK) > text.rfind(END_OF_THINK)


class ReasoningStream:
    """Splits an answer into reasoning and text while it is generated.

    White space beside a tag is dropped. The result does not depend on how the answer is cut into pieces.

    Args:
        is_open: the answer begins inside of reasoning, because the chat template has written `<think>`.
    """

    def __init__(self, *, is_open: bool = False) -> None:
        self._text = ""  # not given out yet
        self._is_open = is_open
        self._keeps_blank = False  # white space at the start of the text belongs to what was given out before
        self._parts: list[Reasoning | str] = []
        self._step = self._start

    def push(self, text: str) -> list[Reasoning | str]:
        """Add some text; returns the parts that are certain now."""
        self._text += text
        return self._run(is_last=False)

    def finish(self) -> list[Reasoning | str]:
        """End the answer; returns what was held back."""
        return self._run(is_last=True)

    def _run(self, *, is_last: bool) -> list[Reasoning | str]:
        while self._step(is_last):
            pass
        parts, self._parts = self._parts, []
        return parts

    # Each step takes some of the text and sets the next step. It returns False if it needs more text.

    def _start(self, is_last: bool) -> bool:
        text = self._text.lstrip()
        if text.startswith(THINK):
            self._text, self._step = text[len(THINK) :], self._reasoning
            return True
        if THINK.startswith(text) and not is_last:
            return False
        self._step, self._keeps_blank = (self._reasoning, False) if self._is_open else (self._answer, True)
        return True

    def _reasoning(self, is_last: bool) -> bool:
        end = self._text.find(END_OF_THINK)
        size = end if end >= 0 else len(self._text) - (0 if is_last else overlap(self._text, END_OF_THINK))
        known = self._text[:size].rstrip()
        if text := known if self._keeps_blank else known.lstrip():
            self._parts.append(Reasoning(text))
            self._keeps_blank = True
        if end < 0:
            self._text = self._text[len(known) :]
            return False
        self._text, self._step, self._keeps_blank = self._text[end + len(END_OF_THINK) :], self._answer, False
        return True

    def _answer(self, is_last: bool) -> bool:
        text, self._text = self._text if self._keeps_blank else self._text.lstrip(), ""
        if text:
            self._parts.append(text)
            self._keeps_blank = True
        return False
