"""The trial: a chat of our own on which a model is measured once, with questions about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import NamedTuple

from am_memory.engines.base import Engine
from am_memory.text.chat_template import RenderedChat


class Trial(NamedTuple):
    """A chat, questions about it with the words of their answers, texts that ask for nothing in it, and other passages.

    The passages are a story, a program with what it prints, and a few lines in other languages.
    """

    chat: list[str]
    questions: list[tuple[str, str]]
    ordinary: list[str]
    passages: list[str]

    def encoded(self, engine: Engine) -> list[int]:
        """The tokens of the chat, some 900."""
        if not engine.has_chat_template:
            return engine.encode("\n\n".join(self.chat))
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(self.chat)]
        chat = RenderedChat(engine, messages)
        return chat.encode(chat.write(chat.messages))

    def places(self, engine: Engine, token_ids: Sequence[int]) -> list[tuple[int, int]]:
        """The tokens [start, end) of each question's answer among those of the chat."""
        texts = [engine.decode([token_id]) for token_id in token_ids]
        return [_place(texts, answer) for _, answer in self.questions]


def _place(texts: Sequence[str], answer: str) -> tuple[int, int]:
    """The tokens that write an answer; white space does not count, since tokenizers differ in it."""
    wanted, written, ends = "".join(answer.split()), "", list[int]()
    for text in texts:
        written += "".join(text.split())
        ends.append(len(written))
    begin = written.find(wanted)
    if begin < 0:  # a vocabulary that cannot spell it
        return 0, 1
    end = begin + len(wanted)
    return next(i for i, e in enumerate(ends) if e > begin), next(i for i, e in enumerate(ends) if e >= end) + 1


def digest(*parts: object) -> str:
    """Changes with the parts of the trial, and the settings, that something is measured with."""
    return sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


@cache
def trial() -> Trial:
    """The trial, read from its file."""
    content = json.loads((resources.files(__package__) / "trial.json").read_text(encoding="utf-8"))
    return Trial(
        content["chat"], [tuple(pair) for pair in content["questions"]], content["ordinary"], content["passages"]
    )
