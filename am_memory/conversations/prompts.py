"""What one call brings: a whole conversation, its messages told apart by digests, and where it can be cut.

All of this takes a time in proportion to what is said, and needs no device. Knows no session and no store.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from am_memory.conversations.tool_calls import arguments_of, prepare
from am_memory.conversations.tool_calls.prompt import without_strict
from am_memory.engines.base import Engine, Message, Tool
from am_memory.errors import InvalidInput
from am_memory.policy import MemoryPolicy
from am_memory.session.chat_history import check

NUMBER = "am_memory.number"
"""Beside what a message says, while it is prepared: which one it is."""


@dataclass(frozen=True)
class Asked:
    """A conversation that something is asked about.

    Attributes:
        keys: a digest of policy and tools, then for each message one of it and all before.
        prepared: messages as the model's chat template takes them.
        num_prepared: how many of these the first messages are, for each number of messages; None where what follows
            has changed them, so that the conversation cannot be cut there.
        tools: for the chat template; empty where the messages tell of them.
        num_chars: about how long all of it is.
    """

    policy: MemoryPolicy
    keys: tuple[str, ...]
    prepared: tuple[Message, ...]
    num_prepared: tuple[int | None, ...]
    tools: tuple[Tool, ...]
    num_chars: int

    @classmethod
    def of(
        cls, engine: Engine, messages: Sequence[Message], tools: Sequence[Tool], policy: MemoryPolicy, owner: str
    ) -> Asked:
        """Look at what a call brings.

        Raises:
            InvalidInput: no messages, or such as no chat template takes.
        """
        if not messages:
            raise InvalidInput("there are no messages: give at least one")
        check(engine, messages)
        numbered = [{**message, NUMBER: number} for number, message in enumerate(messages)]
        prepared, template_tools = prepare(engine, numbered, tools)
        numbers = [message.pop(NUMBER, None) for message in prepared]
        told = [policy.model_dump(mode="json"), *map(without_strict, tools), *([{"owner": owner}] if owner else [])]
        keys = itertools.accumulate(map(key_of, messages), next_key, initial=digest(told))
        return cls(
            policy,
            tuple(keys),
            tuple(prepared),
            _num_prepared(numbers, len(messages)),
            tuple(template_tools or ()),
            sum(len(repr(each)) for each in (*prepared, *(template_tools or ()))),
        )

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """For each number of entries of `keys`, the last place up to there at which it can be cut."""
        return last_cuts(self.num_prepared)


def num_shared(keys: Sequence[str], others: Sequence[str]) -> int:
    """How many of the first keys are the same; each is a digest of all before, so that few have to be compared."""
    return bisect_left(range(min(len(keys), len(others))), True, key=lambda index: keys[index] != others[index])


def last_cuts(ends: Sequence[int | None]) -> tuple[int, ...]:
    """For each number of entries, from 0 on, the largest up to it whose last entry has an end."""
    found = (number if end is not None else 0 for number, end in enumerate(ends, 1))
    return tuple(itertools.accumulate(found, max, initial=0))


def last_common_cut(cuts: Sequence[int], others: Sequence[int], count: int) -> int:
    """The largest number of entries up to `count` at which both can be cut."""
    while not cuts[count] == others[count] == count:
        count = min(cuts[count], others[count])
    return count


def _num_prepared(numbers: Sequence[object], num_messages: int) -> tuple[int | None, ...]:
    """How many prepared messages the first so many messages are, where all that follow come of later ones.

    Args:
        numbers: of the message that each prepared one comes of; None where it has none, as it was made of those between
            its neighbours', or of none at all.
    """
    size = len(numbers)
    firsts, lasts = [num_messages] * (size + 1), [-1] * (size + 1)
    known = [number if isinstance(number, int) else None for number in numbers]
    for index in range(size - 1, -1, -1):  # the first message of which anything from here on comes
        number = known[index]
        firsts[index] = firsts[index + 1] if number is None else min(number, firsts[index + 1])
    for index in range(size):  # the last message of which anything up to here comes
        number = known[index]
        lasts[index + 1] = max(lasts[index], firsts[index + 1] - 1 if number is None else number)
    for index in range(size):  # what has no number comes of the first one after all before it
        if known[index] is None:
            firsts[index] = min(lasts[index] + 1, firsts[index + 1])
    counts: list[int | None] = [None] * (num_messages + 1)
    counts[0] = 0
    for count in range(size + 1):
        if lasts[count] + 1 == firsts[count]:
            counts[lasts[count] + 1] = count
    counts[0], counts[num_messages] = 0, size
    return tuple(counts)


def key_of(message: Message) -> str:
    """A digest of what a message says; the ids of tool calls that nobody answers to are left out.

    Raises:
        InvalidInput: as `digest`.
    """
    said = {name: value for name, value in message.items() if name != "id" and value not in (None, [], "")}
    if isinstance(calls := said.get("tool_calls"), Sequence):
        said["tool_calls"] = [_call(call) for call in calls]
    return digest(said)


def next_key(before: str, key: str) -> str:
    """A digest of a message and all before, by a digest of these and its own."""
    return digest([before, key])


def _call(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
        return call
    return {"name": function.get("name"), "arguments": arguments_of(function.get("arguments"))}


def digest(value: object) -> str:
    """Of anything that JSON can hold.

    Raises:
        InvalidInput: it cannot.
    """
    try:
        written = json.dumps(value, sort_keys=True, default=str)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"messages or tools cannot be written as JSON: {error}") from error
    return sha256(written.encode()).hexdigest()[:24]
