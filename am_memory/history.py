"""Chat messages as the tokens that they add to a context, by the model's own chat template.

A context only grows: what was generated stays as it was generated, and new messages are rendered to follow it, whatever
the template would make of the old ones. Knows no cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from am_memory.engines.base import Engine, Message
from am_memory.errors import InvalidInput

MARK = "\u241e\u241e"
"""Stands for a generated answer while the template is rendered; no text contains it."""


@dataclass(frozen=True)
class History:
    """The messages of one context, told and generated, oldest first; immutable, so that it can be put back.

    Attributes:
        messages: as chat templates take them.
        starts: for each message, how many tokens the context had before it.
        is_answering: the last message is being generated: what the template puts behind it is not in the context yet.
    """

    messages: tuple[Message, ...] = ()
    starts: tuple[int, ...] = ()
    is_answering: bool = False

    def answered(self, text: str) -> History:
        """The model's answer goes on by `text`."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], {**last, "content": f"{last['content']}{text}"}))

    def rewound(self, num_tokens: int) -> History:
        """The messages that had begun when the context had `num_tokens` tokens."""
        count = sum(start < num_tokens for start in self.starts)
        is_answering = self.is_answering and count == len(self.messages)
        return History(self.messages[:count], self.starts[:count], is_answering)

    def told(
        self, engine: Engine, messages: Sequence[Message], num_tokens: int, *, ends_turn: bool
    ) -> tuple[History, list[int]]:
        """With more messages, and the token ids that they add to the context.

        Args:
            num_tokens: of the context so far.
            ends_turn: it ends with the token that ends the model's turn.

        Raises:
            InvalidInput: not chat messages, or a template that rewrites what came before.
        """
        check(engine, messages)
        token_ids = engine.encode(self._suffix(engine, messages, ends_turn=ends_turn))
        told = tuple(dict(message) for message in messages)
        return History((*self.messages, *told), (*self.starts, *[num_tokens] * len(told))), token_ids

    def _suffix(self, engine: Engine, messages: Sequence[Message], *, ends_turn: bool) -> str:
        if not self.messages:
            return engine.render(messages)
        before = [dict(message) for message in self.messages]
        if self.is_answering:
            # The answer stands in the context as it was generated: render what comes after it.
            before[-1]["content"] = MARK
            closing = engine.render([*before, *messages]).rsplit(MARK, 1)[-1]
            if ends_turn:
                for eos in sorted(engine.info.eos_token_ids):
                    closing = closing.removeprefix(engine.decode([eos]))
            return closing
        old, new = engine.render(before), engine.render([*before, *messages])
        if not new.startswith(old):
            raise InvalidInput(
                f"the chat template rewrites the {len(before)} messages before when {len(messages)} are added; append "
                "messages of one turn in one call"
            )
        return new[len(old) :]

    def opened(self, engine: Engine, num_tokens: int, *, ends_turn: bool) -> tuple[History, list[int]]:
        """With the model's answer begun, and the token ids that open it; nothing new where it goes on with one.

        Raises:
            InvalidInput: the last answer is complete, and nothing was said since.
        """
        if not self.messages:
            return self, []
        if self.is_answering:
            if ends_turn:
                raise InvalidInput("the model's last answer is complete: append a message before generating the next")
            return self, []
        old = engine.render(self.messages)
        new = engine.render(self.messages, add_generation_prompt=True)
        answer = {"role": "assistant", "content": ""}
        opening = engine.encode(new[len(old) :]) if new.startswith(old) and new != old else []
        return History((*self.messages, answer), (*self.starts, num_tokens), is_answering=True), opening

    def num_pinned_tokens(self, engine: Engine, kind: str) -> int:
        """Tokens at the start that `kind` of `MemoryPolicy.pinned` keeps exact; 0 where there is no such message."""
        num_pinned = 0
        while num_pinned < len(self.messages) and self.messages[num_pinned]["role"] in ("system", "developer"):
            num_pinned += 1
        if kind == "first_message":
            num_pinned = min(num_pinned + 1, len(self.messages))
        if num_pinned == 0:
            return 0
        # Where two continuations part, the pinned messages have ended, whatever the template puts around them.
        role = "assistant" if self.messages[num_pinned - 1]["role"] == "user" else "user"
        first, second = (
            engine.encode(engine.render([*self.messages[:num_pinned], {"role": role, "content": text}]))
            for text in ("0", "x")
        )
        return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def check(engine: Engine, messages: Sequence[Message]) -> None:
    """Raise InvalidInput for what no chat template can render."""
    if not engine.has_chat_template:
        raise InvalidInput(
            f"{engine.info.name} has no chat template, so it takes no messages: append text or token ids"
        )
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise InvalidInput(
                f'message {position} is {message!r}; give {{"role": "user", "content": "..."}}, or text, or token ids'
            )
