"""The prompt of one call: messages and tools, with a digest for each beginning and the places where it can be cut.

Takes time in proportion to the length of the messages, and needs no device. Knows no session and no store.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

from am_memory.conversations.tool_calls import arguments_of, prepare
from am_memory.conversations.tool_calls.prompt import without_strict
from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput
from am_memory.policy import MemoryPolicy
from am_memory.session.chat_history import require_messages
from am_memory.storage.compact_text import TextCache

SHORT_CHARS = 16_384
"""A prompt up to this long is rendered and encoded in some milliseconds."""
UNCOUNTED = ("id", "reasoning_content")
"""Fields that make no difference between two messages."""
INDEX = "am_memory.index"
"""A field that carries a message's index through `prepare`."""


@dataclass(frozen=True)
class Prompt:
    """The messages and tools of one call, as far as they are known without a device.

    Entry 0 of `keys` and `num_prepared` stands for policy, tools, owner and mounted texts; entry n for n messages.

    Attributes:
        keys: digests; each covers everything before it, so equal keys mean equal beginnings.
        prepared: the messages as the model's chat template takes them.
        num_prepared: how many prepared messages the first n messages give; None where later messages change them, so
            that the conversation cannot be cut there.
        tools: for the chat template; empty where the prepared messages describe the tools.
        is_short: rendering and encoding it takes no longer than a step on the device.
        texts: compact texts that are mounted before the first message.
        options: variables of the chat template for what this call adds.
        num_opening: entries up to the end of the system messages at the beginning, which conversations may share.
    """

    policy: MemoryPolicy
    keys: tuple[str, ...]
    prepared: tuple[Message, ...]
    num_prepared: tuple[int | None, ...]
    tools: tuple[Tool, ...]
    is_short: bool
    texts: tuple[TextCache, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    num_opening: int = 1

    @classmethod
    def of(
        cls,
        engine: Engine,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        policy: MemoryPolicy,
        owner: str = "",
        texts: Sequence[TextCache] = (),
        options: Mapping[str, object] | None = None,
    ) -> Prompt:
        """Prepare the messages and tools of one call.

        Args:
            messages: the whole conversation, as OpenAI's API has it: role, content, tool_calls, tool_call_id, name.
            tools: functions that the model may call, as OpenAI's API has them.
            policy: conversations under different policies share no cache.
            owner: conversations of different owners share no cache, and no answer's time reveals another owner's.
            texts: conversations with different mounted texts share no cache. Their order does not count.
            options: variables of the chat template. They may differ from call to call. Conversations share no cache if
                their options change how the template writes the first messages.

        Raises:
            InvalidInput: no messages, or messages that no chat template takes.
        """
        if not messages:
            raise InvalidInput("there are no messages: give at least one")
        require_messages(engine, messages)
        numbered = [{**message, INDEX: index} for index, message in enumerate(messages)]
        prepared, template_tools = prepare(engine, numbered, tools)
        indices = [message.pop(INDEX, None) for message in prepared]
        texts = sorted({text.uid: text for text in texts}.values(), key=lambda text: text.uid)
        setting = [policy.model_dump(mode="json"), *map(without_strict, tools), *([{"owner": owner}] if owner else [])]
        setting += [{"mounts": [text.uid for text in texts]}] if texts else []
        if options and _opening(engine, prepared, template_tools, options) != _opening(
            engine, prepared, template_tools
        ):
            setting += [{"options": dict(options)}]
        keys = itertools.accumulate(map(message_key, messages), chained_key, initial=digest(setting))
        return cls(
            policy,
            tuple(keys),
            tuple(prepared),
            _num_prepared(indices, len(messages)),
            tuple(template_tools or ()),
            sum(len(repr(item)) for item in (*prepared, *(template_tools or ()))) <= SHORT_CHARS,
            tuple(texts),
            dict(options or {}),
            1 + sum(1 for _ in itertools.takewhile(_is_system, messages)),
        )

    @property
    def opening_key(self) -> str:
        """The digest of the system messages at the beginning."""
        return self.keys[self.num_opening - 1]

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """For each number of entries, the last cut up to there."""
        return last_cuts(self.num_prepared)


def _opening(
    engine: Engine,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: Mapping[str, object] | None = None,
) -> str:
    """The messages up to the user's first one, as the template writes them; "" if it does not take them alone."""
    roles = [message["role"] for message in messages]
    end = roles.index("user") + 1 if "user" in roles else len(roles)
    try:
        return engine.render(messages[:end], tools=tools, options=options)
    except InvalidInput:
        return ""


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")


def num_shared(keys: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first keys are equal. Each key covers all before it, so a binary search finds the number."""
    return bisect_left(range(min(len(keys), len(others))), True, key=lambda index: keys[index] != others[index])


def last_cuts(ends: Sequence[int | None]) -> tuple[int, ...]:
    """For each number of entries, from 0 on, the largest number up to it whose last entry has an end."""
    found = (number if end is not None else 0 for number, end in enumerate(ends, 1))
    return tuple(itertools.accumulate(found, max, initial=0))


def last_common_cut(cuts: Sequence[int], others: Sequence[int], count: int) -> int:
    """The largest number of entries up to `count` at which both can be cut."""
    while not cuts[count] == others[count] == count:
        count = min(cuts[count], others[count])
    return count


def _num_prepared(indices: Sequence[object], num_messages: int) -> tuple[int | None, ...]:
    """For each number of messages, how many prepared messages they give, if no later message changes these.

    Args:
        indices: for each prepared message, the index of the message that it comes from. None where `prepare` made it
            from several messages between its neighbours, or from none.
    """
    size = len(indices)
    firsts, lasts = [num_messages] * (size + 1), [-1] * (size + 1)
    known = [index if isinstance(index, int) else None for index in indices]
    for place in range(size - 1, -1, -1):  # the first message that anything from here on comes from
        index = known[place]
        firsts[place] = firsts[place + 1] if index is None else min(index, firsts[place + 1])
    for place in range(size):  # the last message that anything up to here comes from
        index = known[place]
        lasts[place + 1] = max(lasts[place], firsts[place + 1] - 1 if index is None else index)
    for place in range(size):  # one without an index comes from the first message after all before it
        if known[place] is None:
            firsts[place] = min(lasts[place] + 1, firsts[place + 1])
    counts: list[int | None] = [None] * (num_messages + 1)
    counts[0] = 0
    for count in range(size + 1):
        if lasts[count] + 1 == firsts[count]:
            counts[lasts[count] + 1] = count
    counts[0], counts[num_messages] = 0, size
    return tuple(counts)


def message_key(message: Message) -> str:
    """A digest of one message. Ids of tool calls are left out: APIs change them. So is reasoning: few send it back.

    Raises:
        InvalidInput: as `digest`.
    """
    fields = {name: value for name, value in message.items() if name not in UNCOUNTED and value not in (None, [], "")}
    if isinstance(calls := fields.get("tool_calls"), Sequence):
        fields["tool_calls"] = [_without_id(call) for call in calls]
    return digest(fields)


def chained_key(before: str, key: str) -> str:
    """The digest of a message and of all before it, from the digest of those before and its own."""
    return digest([before, key])


def _without_id(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    return {"name": function.get("name"), "arguments": arguments_of(function.get("arguments"))}


def digest(value: object) -> str:
    """A digest of a value that JSON can hold.

    Raises:
        InvalidInput: JSON cannot hold it.
    """
    try:
        written = json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"messages or tools cannot be written as JSON: {error}") from error
    return sha256(written.encode()).hexdigest()[:24]
