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
from am_memory.text.chat_template import RenderedChat
from am_memory.text.text_stream import REPLACEMENT
from am_memory.text.turns import split_turns

IS_TOOL_RESULT = "is_tool_result"
"""Marks a message that brings tools' results under another role, for a template that knows no tools."""

MAX_LEVELS = 200
"""Of lists and objects in each other in what is told: no code behind this has to fear for its stack."""


@dataclass(frozen=True)
class ChatHistory:
    """The messages of one context, told and generated, oldest first; immutable, so that it can be put back.

    Attributes:
        messages: as chat templates take them.
        starts: for each message, how many tokens the context had before it, the end of an answer before it included.
        is_answering: the last message is being generated, or was cut: what the template puts behind it is not in the
            context yet.
        tools: the functions that the chat template tells the model of, as JSON schemas.
        trusts_messages: what messages spell of control tokens are control tokens.
    """

    messages: tuple[Message, ...] = ()
    starts: tuple[int, ...] = ()
    is_answering: bool = False
    tools: tuple[Message, ...] = ()
    trusts_messages: bool = False

    @property
    def tool_results(self) -> list[tuple[int, int | None]]:
        """Where in the context they begin, and what follows them; None where nothing does."""
        ends = itertools.chain(self.starts[1:], [None])
        return [
            (start, end)
            for message, start, end in zip(self.messages, self.starts, ends, strict=False)
            if message["role"] == "tool" or message.get(IS_TOOL_RESULT)
        ]

    def token_weights(self, tool_result_weight: float, start: int, end: int) -> list[float] | None:
        """How much it counts that the tokens [start, end) can be repeated; None: all alike."""
        if tool_result_weight == 1:
            return None
        weights = [1.0] * (end - start)
        for first, last in self.tool_results:
            for position in range(max(first, start), min(end if last is None else last, end)):
                weights[position - start] = tool_result_weight
        return weights

    def _chat(self, engine: Engine, messages: Sequence[Message] = ()) -> RenderedChat:
        """These messages, and more of them."""
        return RenderedChat(engine, [*self.messages, *messages], self.tools, trusts_messages=self.trusts_messages)

    def _grown(self, messages: Sequence[Message], starts: Sequence[int], *, is_answering: bool = False) -> ChatHistory:
        messages, starts = (*self.messages, *messages), (*self.starts, *starts)
        return replace(self, messages=messages, starts=starts, is_answering=is_answering)

    def with_answer_text(self, text: str) -> ChatHistory:
        """The model's answer goes on by `text`."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], {**last, "content": f"{last['content']}{text}"}))

    def with_plain_text(self, text: str, num_tokens: int) -> ChatHistory:
        """Plain text after messages: the model's answer goes on by it, or begins with it, as it stands.

        Args:
            num_tokens: of the context so far.
        """
        if not self.messages:
            return self
        if self.is_answering:
            return self.with_answer_text(text)
        answer = {"role": "assistant", "content": text}
        return self._grown([answer], [num_tokens], is_answering=True)

    def truncated(self, engine: Engine, token_ids: Sequence[int]) -> ChatHistory:
        """What is left of the messages in `token_ids`, the beginning of the context; the last one may be cut."""
        count = sum(start < len(token_ids) for start in self.starts)
        is_cut = count > 0 and self.starts[count : count + 1] != (len(token_ids),)
        left = replace(self, messages=self.messages[:count], starts=self.starts[:count], is_answering=is_cut)
        return left._cut(engine, token_ids[left.starts[-1] :]) if is_cut else left

    def _cut(self, engine: Engine, token_ids: Sequence[int]) -> ChatHistory:
        """The last message as far as these tokens of it say it; calls and parts are then the text that they are."""
        last = self.messages[-1]
        content, header = last.get("content"), self._header(engine)
        words = engine.decode(header, skip_special=True) if header else ""
        if last["role"] == "assistant" and isinstance(content, str) and content.startswith(words):
            header = []  # it was begun by plain text, as that stood
        said = token_ids[len(header) :]
        text = engine.decode(said, skip_special=True).rstrip(REPLACEMENT) if said else ""
        if isinstance(content, str) and not last.get("tool_calls"):
            size = next(size for size in range(len(content), -1, -1) if text.endswith(content[:size]))
            last = {**last, "content": content[:size]}
        else:
            last = {**{key: value for key, value in last.items() if key != "tool_calls"}, "content": text}
        return replace(self, messages=(*self.messages[:-1], last))

    def _header(self, engine: Engine) -> list[int]:
        """The tokens that the template writes before what the last message says, as far as that can be told."""
        chat = self._chat(engine)
        *before, last = chat.messages
        try:
            begin = chat.write(before) if before else ""
            told = [chat.write([*before, {"role": last["role"], "content": content}]) for content in ("0", "x")]
        except InvalidInput:  # of a template that insists on other fields
            return []
        size = next((size for size, (one, other) in enumerate(zip(*told, strict=False)) if one != other), 0)
        header = told[0][:size]
        return chat.encode(header[len(begin) :]) if header.startswith(begin) else []

    def with_messages(
        self, engine: Engine, messages: Sequence[Message], num_tokens: int, *, ends_turn: bool
    ) -> tuple[ChatHistory, list[int]]:
        """With more messages, and the token ids that they add to the context.

        Args:
            num_tokens: of the context so far.
            ends_turn: it ends with the token that ends the model's turn.

        Raises:
            InvalidInput: not chat messages, or a template that rewrites what came before.
        """
        check(engine, messages)
        chat = self._chat(engine, messages)
        closing, turns = self._added(engine, chat, ends_turn=ends_turn)
        token_ids = chat.encode(closing + "".join(turns))
        starts = [num_tokens] * len(messages)
        parts = [chat.encode(text) for text in (closing, *turns)] if closing or len(turns) > 1 else [[]]
        if [*itertools.chain(*parts)] == token_ids:  # else a token spans two messages
            starts = list(itertools.accumulate(map(len, parts[:-1]), initial=num_tokens))[1:]
        told = tuple(dict(message) for message in messages)
        return self._grown(told, starts), token_ids

    def _added(self, engine: Engine, chat: RenderedChat, *, ends_turn: bool) -> tuple[str, list[str]]:
        """What closes the answer before, then what the template writes for each message behind these.

        Where it writes a message in another way once others follow (tool results in one turn), that is all with the
        last of them.
        """
        count = len(self.messages)
        before, messages = chat.messages[:count], chat.messages[count:]
        if self.is_answering:
            # The answer stands in the context as it was generated: only what is behind it counts.
            closing, whole = (chat.write_behind(said, count - 1) for said in (before, chat.messages))
            if ends_turn:
                closing, whole = _without_eos(engine, closing), _without_eos(engine, whole)
            closing = closing if whole.startswith(closing) else ""
            added = whole[len(closing) :]
        else:
            closing, begin, whole = "", chat.write(before) if before else "", chat.write()
            if not whole.startswith(begin):
                raise InvalidInput(
                    f"the chat template rewrites the {count} messages before when {len(messages)} are added; append "
                    "messages of one turn in one call"
                )
            added = whole[len(begin) :]
        return closing, split_turns(chat, count, added)

    def with_answer_begun(self, engine: Engine, num_tokens: int, *, ends_turn: bool) -> tuple[ChatHistory, list[int]]:
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
        chat = self._chat(engine)
        old, new = chat.write(), chat.write(add_generation_prompt=True)
        answer = {"role": "assistant", "content": ""}
        opening = chat.encode(new[len(old) :]) if new.startswith(old) and new != old else []
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
        chat = replace(self, messages=self.messages[:num_pinned])._chat(engine)
        first, second = (
            chat.encode(chat.write([*chat.messages, {"role": role, "content": text}])) for text in ("0", "x")
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
    require_levels(messages, "messages")


def require_levels(values: Sequence[object], what: str) -> None:
    """Raise InvalidInput where these are nested more deeply than can be told."""
    if is_nested(values, MAX_LEVELS):
        raise InvalidInput(f"the {what} are nested too deeply: give them no more than {MAX_LEVELS} levels")


def is_nested(value: object, levels: int) -> bool:
    """Whether there are lists or objects in each other for more than so many levels."""
    inside = {id(value): value}  # each once, however many hold it
    for _ in range(levels):
        inside = {
            id(item): item
            for outer in inside.values()
            for item in (outer.values() if isinstance(outer, Mapping) else outer)  # type: ignore[attr-defined]
            if isinstance(item, Mapping | list | tuple)
        }
    return bool(inside)
