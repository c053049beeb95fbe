"""The chat messages of a context, and the tokens that each new message adds to it, by the model's chat template.

A context only grows. Generated tokens stay as they were generated, and new messages are rendered to follow them, even
where the template would now write the old ones differently. Knows no cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from am_memory.engines.base import Engine, Message
from am_memory.errors import InvalidInput
from am_memory.text.chat_template import RenderedChat
from am_memory.text.text_stream import REPLACEMENT
from am_memory.text.turns import split_turns

IS_TOOL_RESULT = "is_tool_result"
"""Marks a message with tool results under another role, for a template that knows no tools."""

MAX_LEVELS = 200
"""Most levels of nested lists and objects in messages: deeper ones could overflow the stack of code that reads them."""


@dataclass(frozen=True)
class ChatHistory:
    """The messages of one context, appended and generated, oldest first. Immutable: a failed step restores the old one.

    Attributes:
        messages: as chat templates take them.
        starts: for each message, the number of tokens before it, including those that end the answer before it.
        is_answering: the last message is being generated, or was cut; the tokens that the template writes behind it are
            not in the context yet.
        tools: functions that the chat template describes to the model, as JSON schemas.
        trusts_messages: read control tokens that messages spell as control tokens.
        options: variables of the chat template for what is added from now on; they are not saved.
    """

    messages: tuple[Message, ...] = ()
    starts: tuple[int, ...] = ()
    is_answering: bool = False
    tools: tuple[Message, ...] = ()
    trusts_messages: bool = False
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def tool_results(self) -> list[tuple[int, int | None]]:
        """The first token of each tool result, and the first one behind it; None if the result is the last message."""
        ends = itertools.chain(self.starts[1:], [None])
        return [
            (start, end)
            for message, start, end in zip(self.messages, self.starts, ends, strict=False)
            if message["role"] == "tool" or message.get(IS_TOOL_RESULT)
        ]

    def token_weights(self, tool_result_weight: float, start: int, end: int) -> list[float] | None:
        """The weight of each of the tokens [start, end) when a compaction is fitted; None: all have weight 1.

        Args:
            tool_result_weight: weight of the tokens of tool results; all others have weight 1.
        """
        if tool_result_weight == 1:
            return None
        weights = [1.0] * (end - start)
        for first, last in self.tool_results:
            for position in range(max(first, start), min(end if last is None else last, end)):
                weights[position - start] = tool_result_weight
        return weights

    def _chat(self, engine: Engine, messages: Sequence[Message] = ()) -> RenderedChat:
        """These messages and some more, rendered."""
        messages = [*self.messages, *messages]
        return RenderedChat(engine, messages, self.tools, trusts_messages=self.trusts_messages, options=self.options)

    def _grown(self, messages: Sequence[Message], starts: Sequence[int], *, is_answering: bool = False) -> ChatHistory:
        messages, starts = (*self.messages, *messages), (*self.starts, *starts)
        return replace(self, messages=messages, starts=starts, is_answering=is_answering)

    def with_answer_text(self, text: str) -> ChatHistory:
        """With `text` added to the model's answer."""
        last = self.messages[-1]
        return replace(self, messages=(*self.messages[:-1], {**last, "content": f"{last['content']}{text}"}))

    def with_plain_text(self, text: str, num_tokens: int) -> ChatHistory:
        """With plain text after the messages: it continues the model's answer, or begins one.

        Args:
            num_tokens: number of tokens in the context so far.
        """
        if not self.messages:
            return self
        if self.is_answering:
            return self.with_answer_text(text)
        answer = {"role": "assistant", "content": text}
        return self._grown([answer], [num_tokens], is_answering=True)

    def truncated(self, engine: Engine, token_ids: Sequence[int]) -> ChatHistory:
        """The messages that remain if only the first tokens of the context do, `token_ids`; the last one may be cut."""
        count = sum(start < len(token_ids) for start in self.starts)
        is_cut = count > 0 and self.starts[count : count + 1] != (len(token_ids),)
        left = replace(self, messages=self.messages[:count], starts=self.starts[:count], is_answering=is_cut)
        return left._cut(engine, token_ids[left.starts[-1] :]) if is_cut else left

    def _cut(self, engine: Engine, token_ids: Sequence[int]) -> ChatHistory:
        """With the last message cut to the text of `token_ids`, its first tokens; tool calls and parts become text."""
        last = self.messages[-1]
        content, header = last.get("content"), self._header(engine)
        header_text = engine.decode(header, skip_special=True) if header else ""
        if last["role"] == "assistant" and isinstance(content, str) and content.startswith(header_text):
            header = []  # plain text began this answer, without a header
        content_ids = token_ids[len(header) :]
        text = engine.decode(content_ids, skip_special=True).rstrip(REPLACEMENT) if content_ids else ""
        if isinstance(content, str) and not last.get("tool_calls"):
            size = next(size for size in range(len(content), -1, -1) if text.endswith(content[:size]))
            last = {**last, "content": content[:size]}
        else:
            last = {**{key: value for key, value in last.items() if key != "tool_calls"}, "content": text}
        return replace(self, messages=(*self.messages[:-1], last))

    def opening(self, engine: Engine) -> list[int]:
        """The tokens that the template writes before the content of the first message; empty if they are not found."""
        return replace(self, messages=self.messages[:1])._header(engine) if self.messages else []

    def _header(self, engine: Engine) -> list[int]:
        """The tokens that the template writes before the content of the last message; empty if they cannot be found."""
        chat = self._chat(engine)
        *before, last = chat.messages
        try:
            begin = chat.write(before) if before else ""
            first, second = (
                chat.write([*before, {"role": last["role"], "content": content}]) for content in ("0", "x")
            )
        except InvalidInput:  # the template demands other fields
            return []
        size = next((size for size, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), 0)
        header = first[:size]
        return chat.encode(header[len(begin) :]) if header.startswith(begin) else []

    def with_messages(
        self, engine: Engine, messages: Sequence[Message], num_tokens: int, *, ends_turn: bool
    ) -> tuple[ChatHistory, list[int]]:
        """With more messages, and the token ids that they add to the context.

        Args:
            num_tokens: number of tokens in the context so far.
            ends_turn: the last token of the context ends the model's turn.

        Raises:
            InvalidInput: these are not chat messages, or the template now writes the messages before them differently.
        """
        require_messages(engine, messages)
        chat = self._chat(engine, messages)
        closing, turns = self._added(engine, chat, ends_turn=ends_turn)
        token_ids = chat.encode(closing + "".join(turns))
        starts = [num_tokens] * len(messages)
        parts = [chat.encode(text) for text in (closing, *turns)] if closing or len(turns) > 1 else [[]]
        if [*itertools.chain(*parts)] == token_ids:  # else a token spans two messages
            starts = list(itertools.accumulate(map(len, parts[:-1]), initial=num_tokens))[1:]
        return self._grown([dict(message) for message in messages], starts), token_ids

    def _added(self, engine: Engine, chat: RenderedChat, *, ends_turn: bool) -> tuple[str, list[str]]:
        """The text that ends the answer before, and the text that the template writes for each new message.

        A template may write several messages as one piece, such as tool results in one turn. The last of them then has
        all of the text.
        """
        count = len(self.messages)
        before, messages = chat.messages[:count], chat.messages[count:]
        if self.is_answering:
            # The context holds the answer as it was generated: only the text behind it counts.
            closing, whole = (chat.write_behind(shown, count - 1) for shown in (before, chat.messages))
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
        """With an empty answer of the model, and the token ids that open it. An unfinished answer simply goes on.

        Raises:
            InvalidInput: the last answer is complete, and no message has been appended since.
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
        """Tokens of the messages that stay exact if `MemoryPolicy.pinned` is `kind`; 0 if there is no such message."""
        num_pinned = 0
        while num_pinned < len(self.messages) and self.messages[num_pinned]["role"] in ("system", "developer"):
            num_pinned += 1
        if kind == "first_message":
            num_pinned = min(num_pinned + 1, len(self.messages))
        if num_pinned == 0:
            return 0
        # The pinned messages end where two different continuations first differ, whatever the template writes around.
        role = "assistant" if self.messages[num_pinned - 1]["role"] == "user" else "user"
        chat = replace(self, messages=self.messages[:num_pinned])._chat(engine)
        first, second = (
            chat.encode(chat.write([*chat.messages, {"role": role, "content": text}])) for text in ("0", "x")
        )
        differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        return self.starts[0] + next(differ, min(len(first), len(second)))


def _without_eos(engine: Engine, text: str) -> str:
    """The text without the token that ends the model's turn, if it begins with one."""
    ends = (engine.decode([token_id]) for token_id in sorted(engine.info.eos_token_ids))
    return next((text.removeprefix(end) for end in ends if text.startswith(end)), text)


def require_messages(engine: Engine, messages: Sequence[Message]) -> None:
    """Raise InvalidInput for messages that no chat template can render."""
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


def checked_tools(tools: object) -> tuple[Message, ...]:
    """The tools that a chat template is told of.

    Raises:
        InvalidInput: they are no list of objects.
    """
    if isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools):
        return tuple(tools)
    raise InvalidInput(f"tools are {tools!r}; give a list of objects, each {{'type': 'function', 'function': {{...}}}}")


def require_levels(values: Sequence[object], what: str) -> None:
    """Raise InvalidInput if lists and objects in these values are nested more than `MAX_LEVELS` deep."""
    if is_nested(values, MAX_LEVELS):
        raise InvalidInput(f"the {what} are nested too deeply: give them no more than {MAX_LEVELS} levels")


def is_nested(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep."""
    inside = {id(value): value}  # by id, so that a shared one counts once
    for _ in range(levels):
        inside = {
            id(item): item
            for outer in inside.values()
            for item in (outer.values() if isinstance(outer, Mapping) else outer)  # type: ignore[attr-defined]
            if isinstance(item, Mapping | list | tuple)
        }
    return bool(inside)
