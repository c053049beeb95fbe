"""One chat completion: read in steps, answered in parts, kept only when it is whole."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.chat import ChatAnswer, ChatRequest, Part, ToolCall
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.threads import Threads

POLICY = MemoryPolicy(trigger_tokens=400, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=32)
QUESTION = {"role": "user", "content": "a question that takes more than one chunk of thirty-two tokens to read"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sea", "sky"]}}, "required": ["at"]},
    },
}


@pytest.fixture
def threads(engine: TransformersEngine) -> Threads:
    return Threads(Memory(engine, POLICY))


def request(**options: object) -> ChatRequest:
    return ChatRequest(**{"messages": [QUESTION], "max_tokens": 8, "sampling": Sampling(), **options})  # type: ignore[arg-type]


def run(answer: ChatAnswer) -> list[Part]:
    for _ in answer.read():
        pass
    return [part for delta in answer.generate() for part in delta.parts]


def test_a_prompt_is_read_in_steps_of_a_chunk(threads: Threads) -> None:
    left = list(ChatAnswer(threads, request()).read())
    assert len(left) > 2
    assert all(before - after <= 32 for before, after in pairwise(left))
    assert left[-1] == 0


def test_the_parts_are_the_message_that_is_kept(threads: Threads) -> None:
    answer = ChatAnswer(threads, request())
    parts = run(answer)
    assert answer.message == {"role": "assistant", "content": "".join(map(str, parts))}
    assert answer.finish_reason == "length"
    answer.keep()
    again = ChatAnswer(threads, request(messages=[QUESTION, answer.message, QUESTION]))
    run(again)
    assert again.usage.cached_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_that_is_not_kept_leaves_nothing_behind(threads: Threads) -> None:
    run(ChatAnswer(threads, request()))
    assert threads.names() == []


def test_owners_share_nothing_of_the_same_conversation(threads: Threads) -> None:
    first = ChatAnswer(threads, request(owner="ada", thread="ada/1"))
    run(first)
    first.keep()
    cached = []
    for owner in ("ada", "bob", ""):
        answer = ChatAnswer(threads, request(owner=owner, thread=f"{owner}/2"))
        run(answer)
        cached.append(answer.usage.cached_tokens)
    assert cached[0] > 0
    assert cached[1:] == [0, 0]


def test_a_forced_call_is_a_part_and_the_reason_to_finish(threads: Threads) -> None:
    answer = ChatAnswer(threads, request(tools=[TOOL], tool_choice="look", max_tokens=200))
    (call,) = run(answer)
    assert isinstance(call, ToolCall)
    assert call.arguments["at"] in ("sea", "sky")
    assert json.loads(call.arguments_json) == call.arguments
    assert answer.finish_reason == "tool_calls"
    assert answer.message["tool_calls"] == [call.as_message()]


def test_every_token_that_is_said_has_its_log_probability(threads: Threads) -> None:
    answer = ChatAnswer(threads, request(top_logprobs=2))
    for _ in answer.read():
        pass
    found = [token for delta in answer.generate() for token in delta.logprobs]
    said = answer.session.tokens[-answer.num_tokens :]
    assert [token.token_id for token in found] == list(said)
    assert all(token.top[0] == (token.token_id, token.logprob) for token in found)  # greedy: the likeliest
    assert all(len(token.top) == 2 for token in found)


def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(threads: Threads) -> None:
    with pytest.raises(InvalidInput, match="'sub' is none of the tools: look"):
        ChatAnswer(threads, request(tools=[TOOL], tool_choice="sub"))
    with pytest.raises(InvalidInput, match="there are none"):
        ChatAnswer(threads, request(tool_choice="required"))
    with pytest.raises(InvalidInput, match="response_format"):
        ChatAnswer(threads, request(response_format={"type": "poem"}))
