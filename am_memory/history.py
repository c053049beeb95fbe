"""Chat messages as the tokens that they add to a context, by the model's own chat template.

A context only grows: what was generated stays as it was generated, and new messages are rendered to follow it, whatever
the template would make of the old ones. Knows no cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from am_memory.engines.base import Engine, Message
from am_memory.errors import InvalidInput
from am_memory.tokens import REPLACEMENT

IS_TOOL_RESULT = "is_tool_result"
"""Marks a message that brings tools' results under another role, for a template that knows no tools."""

MARK = "\u241e\u241e"
"""Stands for a generated answer while the template is rendered; no text contains it."""


@dataclass(frozen=True)
class History:
    """The messages of one context, told and generated, oldest first; immutable, so that it can be put back.

    Attributes:
        messages: as chat templates take them.
        starts: for each message, how many tokens the context had before it, the end of an answer before it included.
        is_answering: the last message is being generated, or was cut: what the template puts behind it is not in the
            context yet.
        tools: the functions that the chat template tells the model of, as JSON schemas.
    """

    messages: tuple[Message, ...] = ()
    starts: tuple[int, ...] = ()
    is_answering: bool = False
    tools: tuple[Message, ...] = ()

    @property
    def tool_results(self) -> list[tuple[int, int | None]]:
        """Where in the context they begin, and what follows them; None where nothing does."""
        ends = itertools.chain(self.starts[1:], [None])
        return [
            (start, end)
            for message, start, end in zip(self.messages, self.starts, ends, strict=False)
            if message["role"] == "tool" or message.get(IS_TOOL_RESULT)
        ]

    def weights(self, tool_result_weight: float, start: int, end: int) -> list[float] | None:
        """How much it counts that the tokens [start, end) can be repeated; None: all alike."""
        if tool_result_weight == 1:
            return None
        weights = [1.0] * (end - start)
        for first, last in self.tool_results:
            for position in range(max(first, start), min(end if last is None else last, end)):
                weights[position - start] = tool_result_weight
        return weights

    def _render(self, engine: Engine, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        return engine.render(messages, tools=self.tools, add_generation_prompt=add_generation_prompt)

    def _grown(self, messages: Sequence[Message], starts: Sequence[int], *, is_answering: bool = False) -> History:
        messages, starts = (*self.messages, *messages), (*self.starts, *starts)
        return replace(self, messages=messages, starts=starts, is_answering=is_answering)

    def answered(self, text: str) -> History:
        """The model's answer goes on by `text`."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], {**last, "content": f"{last['content']}{text}"}))

    def continued(self, text: str, num_tokens: int) -> History:
        """Plain text after messages: the model's answer goes on by it, or begins with it, as it stands.

        Args:
            num_tokens: of the context so far.
        """
        if not self.messages:
            return self
        if self.is_answering:
            return self.answered(text)
        answer = {"role": "assistant", "content": text}
        return self._grown([answer], [num_tokens], is_answering=True)

    def rewound(self, engine: Engine, token_ids: Sequence[int]) -> History:
        """What is left of the messages in `token_ids`, the beginning of the context; the last one may be cut."""
        count = sum(start < len(token_ids) for start in self.starts)
        is_cut = count > 0 and self.starts[count : count + 1] != (len(token_ids),)
        left = replace(self, messages=self.messages[:count], starts=self.starts[:count], is_answering=is_cut)
        return left._cut(engine.decode(token_ids[left.starts[-1] :], skip_special=True)) if is_cut else left

    def _cut(self, text: str) -> History:
        """The last message's content up to where `text` ends, which may have words of the template before it."""
        last, text = self.messages[-1], text.rstrip(REPLACEMENT)
        content = last.get("content")
        if not isinstance(content, str):
            return self
        size = next(size for size in range(len(content), -1, -1) if text.endswith(content[:size]))
        return replace(self, messages=(*self.messages[:-1], {**last, "content": content[:size]}))

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
        closing, *texts = self._texts(engine, messages, ends_turn=ends_turn)
        token_ids = engine.encode(closing + "".join(texts))
        parts = [engine.encode(text) for text in (closing, *texts)]
        starts = list(itertools.accumulate(map(len, parts[:-1]), initial=num_tokens))[1:]
        if [*itertools.chain(*parts)] != token_ids:  # a token spans two messages
            starts = [starts[0]] * len(texts)
        told = tuple(dict(message) for message in messages)
        return self._grown(told, starts), token_ids

    def _texts(self, engine: Engine, messages: Sequence[Message], *, ends_turn: bool) -> list[str]:
        """What closes the answer before, then what the template writes for each of the messages.

        Where it writes a message in another way once others follow (tool results in one turn), that is all with the
        last of them.
        """
        before = [dict(message) for message in self.messages]
        if self.is_answering:
            before[-1]["content"] = MARK  # it stands in the context as it was generated: only what follows counts

        def rendered(count: int) -> str:
            text = self._render(engine, [*before, *messages[:count]]) if before or count else ""
            if self.is_answering:
                text = text.rsplit(MARK, 1)[-1]
                return _without_eos(engine, text) if ends_turn else text
            return text

        begin, whole = rendered(0), rendered(len(messages))
        is_extended = whole.startswith(begin)
        if not is_extended and not self.is_answering:
            raise InvalidInput(
                f"the chat template rewrites the {len(before)} messages before when {len(messages)} are added; append "
                "messages of one turn in one call"
            )
        bounds = [len(begin) if is_extended else 0]
        for count in range(1, len(messages)):
            try:
                text = rendered(count)
            except InvalidInput:  # of a template that takes them together only
                text = ""
            bounds.append(len(text) if text and whole.startswith(text) else bounds[-1])
        closing = whole[: bounds[0]] if self.is_answering else ""
        return [closing, *(whole[start:end] for start, end in itertools.pairwise([*bounds, len(whole)]))]

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
        old = self._render(engine, self.messages)
        new = self._render(engine, self.messages, add_generation_prompt=True)
        answer = {"role": "assistant", "content": ""}
        opening = engine.encode(new[len(old) :]) if new.startswith(old) and new != old else []
        return self._grown([answer], [num_tokens], is_answering=True), opening

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
            engine.encode(self._render(engine, [*self.messages[:num_pinned], {"role": role, "content": text}]))
            for text in ("0", "x")
        )
        differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        return self.starts[0] + next(differ, min(len(first), len(second)))


def _without_eos(engine: Engine, text: str) -> str:
    """Without the token that ends the model's turn, where the text begins with one."""
    ends = (engine.decode([token_id]) for token_id in sorted(engine.info.eos_token_ids))
    return next((text.removeprefix(end) for end in ends if text.startswith(end)), text)


def check(engine: Engine, messages: Sequence[Message]) -> None:
    """Raise InvalidInput for what no chat template can render."""
    if not engine.has_chat_template:
        raise InvalidInput(
            f"{engine.info.name} has no chat template, so it takes no messages: append text or token ids"
        )
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidInput(
                f'message {position} is {message!r}; give {{"role": "user", "content": "..."}}, or text, or token ids'
            )
