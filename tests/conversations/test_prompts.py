"""Prompts: where a conversation can be cut, what a cut guarantees, and what finding it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from am_memory import MemoryPolicy
from am_memory.conversations import prompts
from am_memory.conversations.prompts import Prompt, last_common_cut, last_cuts, message_key, num_shared
from am_memory.conversations.tool_calls import arguments_of, prepare
from am_memory.engines.base import Message
from am_memory.errors import InvalidInput

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
WRITTEN = {
    "text": "a template that knows no tools",
    "one message for each": 'probe_tool probe_result [TOOL_CALLS] [{"name": "probe_call"',
    "one call a message": 'probe_tool probe_result {"name": "probe_call", "parameters": {"x": 1}}',
}


class Template:
    """The part of an engine that `prepare` uses."""

    has_chat_template = True

    def __init__(self, written: str) -> None:
        self.written = written

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        return self.written


def calling(*ids: str) -> dict[str, object]:
    calls = [{"id": id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for id in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def messages_of(roles: str) -> list[dict[str, object]]:
    """One message for each letter: s system, u user, a assistant, r a tool's result, a digit an answer with calls."""
    told: list[dict[str, object]] = []
    ids: list[str] = []
    for number, role in enumerate(roles):
        if role.isdigit():
            ids = [f"{number}.{call}" for call in range(int(role))]
            told.append(calling(*ids))
        elif role == "r":
            id = ids.pop(0) if ids else "unknown"
            told.append({"role": "tool", "tool_call_id": id, "content": f"result {number}"})
        else:
            name = {"s": "system", "u": "user", "a": "assistant"}[role]
            told.append({"role": name, "content": f"said {number}"})
    return told


def prompt_of(engine: Any, messages: Sequence[Message], tools: Sequence[Message] = ()) -> Prompt:
    return Prompt.of(engine, messages, tools, MemoryPolicy())


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
@settings(max_examples=150, deadline=None, derandomize=True)
@given(roles=st.text("uua12r", min_size=1, max_size=9), begins=st.sampled_from(["", "s"]), has_tools=st.booleans())
def test_where_it_can_be_cut_the_first_messages_are_prepared_alone_as_with_the_others(
    written: str, roles: str, begins: str, has_tools: bool
) -> None:
    engine: Any = Template(written)
    messages, tools = messages_of(begins + roles), [TOOL] if has_tools else []
    found = prompt_of(engine, messages, tools)
    assert found.prepared == tuple(prepare(engine, messages, tools)[0])
    for count, num_prepared in enumerate(found.num_prepared[1:], 1):
        if num_prepared is not None:
            assert prepare(engine, messages[:count], tools)[0] == list(found.prepared[:num_prepared])
    assert found.num_prepared[-1] == len(found.prepared)


@pytest.mark.parametrize(
    ("written", "roles", "num_prepared"),
    [
        ("text", "sua", (0, 1, 2, 3)),
        ("text", "u1ra", (0, 1, 2, 3, 4)),
        ("text", "u2rra", (0, 1, 2, None, 3, 4)),
        ("one message for each", "u2rra", (0, 1, 2, 3, 4, 5)),
        ("one call a message", "u1ra", (0, 1, 2, 3, 4)),
        ("one call a message", "u2rra", (0, 1, None, 4, 5, 6)),
    ],
)
def test_it_can_be_cut_wherever_that_is_possible(
    written: str, roles: str, num_prepared: tuple[int | None, ...]
) -> None:
    found = prompt_of(Template(WRITTEN[written]), messages_of(roles)).num_prepared
    assert found == num_prepared


def test_messages_are_prepared_once_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beginning of a conversation was prepared separately: 6,400 messages took minutes and blocked everyone."""
    prepared = []

    def counting(engine: Any, messages: Sequence[Message], tools: Sequence[Message]) -> Any:
        prepared.append(len(messages))
        return prepare(engine, messages, tools)

    monkeypatch.setattr(prompts, "prepare", counting)
    found = prompt_of(Template(WRITTEN["text"]), messages_of("ua" * 800))
    assert prepared == [1600]
    assert found.num_prepared == tuple(range(1601))


class Counting(Sequence[str]):
    """Keys that count how often they are read."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys, self.num_looks = keys, 0

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: Any) -> Any:
        self.num_looks += 1
        return self.keys[index]


def test_what_two_conversations_share_is_found_by_a_few_looks() -> None:
    mine = prompt_of(Template(""), messages_of("ua" * 2000)).keys
    for count in (0, 1, 1999, 4001):
        other = Counting([*mine[:count], *(f"other {index}" for index in range(4001 - count))])
        assert num_shared(other, mine) == count
        assert other.num_looks <= 13


def test_an_equal_message_after_another_beginning_is_another() -> None:
    one, other = messages_of("uau"), messages_of("aau")
    assert num_shared(prompt_of(Template(""), one).keys, prompt_of(Template(""), other).keys) == 1


def test_a_cut_is_one_that_both_allow() -> None:
    mine, other = last_cuts((0, None, 5, None, 9)), last_cuts((0, 3, None, 7, None))
    assert (mine, other) == ((0, 1, 1, 3, 3, 5), (0, 1, 2, 2, 4, 4))
    assert [last_common_cut(mine, other, count) for count in range(6)] == [0, 1, 1, 1, 1, 1]


def test_what_is_no_message_is_refused() -> None:
    wrong: Any = ["not a message"]
    with pytest.raises(InvalidInput, match="message 0 is 'not a message'"):
        prompt_of(Template(""), wrong)


# Arguments and other values that clients may nest

DEEP = 3000
ARGUMENTS = [
    "abc", '"abc"', "[1,2]", "[1,     2]", [1, 2], "1", "1.0", 1, "null", "", None, "{}", {}, '{"a": 1}', '{"a":1}',
    {"a": 1}, '{"a": 2}', '{"a": ' * 100 + "1" + "}" * 100, '{"a":' * 100 + "1" + "}" * 100, "[" * DEEP, "[ " * DEEP,
]  # fmt: skip


def calling_with(arguments: object) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": arguments}}]}


def test_calls_are_the_same_where_their_arguments_are_told_the_same() -> None:
    """Arguments that are not an object go to the model unchanged; two that differed had one key."""
    keys = [message_key(calling_with(arguments)) for arguments in ARGUMENTS]
    told = [arguments_of(arguments) for arguments in ARGUMENTS]
    pairs = [(one, other) for one in range(len(told)) for other in range(one)]
    assert all((keys[one] == keys[other]) == (told[one] == told[other]) for one, other in pairs)
    assert sum(keys[one] == keys[other] for one, other in pairs) == 10  # four are {}, three {"a": 1}, two 1


def nested(levels: int) -> object:
    value: list[object] = []
    for _ in range(levels):
        value = [value, {"a": value}]  # each value occurs twice, which JSON cannot express
    return value


def itself() -> object:
    value: list[object] = []
    value += [value, value]
    return value


@pytest.mark.parametrize("deep", [nested(DEEP), itself()], ids=["deep", "itself"])
@pytest.mark.parametrize("place", ["content", "field", "arguments", "tools"])
def test_what_is_nested_too_deeply_is_refused(deep: object, place: str) -> None:
    said: list[dict[str, object]] = [{"role": "user", "content": "hi"}]
    tools = [{**TOOL, "function": {"name": "look", "parameters": deep}}] if place == "tools" else []
    match place:
        case "content":
            said.append({"role": "user", "content": deep})
        case "field":
            said.append({"role": "user", "content": "hi", "x": deep})
        case "arguments":
            said.append(calling_with({"a": deep}))
    what = "tools" if tools else "messages"
    with pytest.raises(InvalidInput, match=f"the {what} are nested too deeply: give them no more than 200 levels"):
        prompt_of(Template("text"), said, tools)
    with pytest.raises(InvalidInput, match="nested too deeply"):
        prepare(Template("text"), said, tools)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["{", '{"a":'])
def test_arguments_of_any_depth_are_told_as_they_were_written(written: str) -> None:
    text = written * DEEP
    found = prompt_of(Template("text"), [{"role": "user", "content": "hi"}, calling_with(text)])
    assert text in str(found.prepared[-1]["content"])


def test_names_that_no_json_has_are_refused() -> None:
    with pytest.raises(InvalidInput, match="cannot be written as JSON"):
        prompt_of(Template("text"), [{"role": "user", "content": "hi", "x": {1: 1, "a": 1}}])
