"""A system prompt that conversations share is read once, also when the first of them has compacted it away."""

from __future__ import annotations

import pytest

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.conversations.chat import HostWork, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.threads import Threads
from am_memory.engines.transformers import TransformersEngine

POLICY = MemoryPolicy(trigger_tokens=200, keep_ratio=0.25, pinned="sinks", keep_recent=16, chunk_tokens=32)
SYSTEM = {"role": "system", "content": "You answer in the words of an old sailor who has seen the ice."}
LONG = "The sea is wide, and the owl does not swim in it. " * 8


@pytest.fixture
def threads(engine: TransformersEngine) -> Threads:
    return Threads(Memory(engine, POLICY))


def answered(threads: Threads, text: str, thread: str, owner: str = "ada") -> ChatAnswer:
    messages = [SYSTEM, {"role": "user", "content": text}]
    request = ChatRequest(messages, max_tokens=4, sampling=Sampling(temperature=0), thread=thread, owner=owner)
    answer = ChatAnswer(threads, request)
    for step in answer_chat(answer):
        if isinstance(step, HostWork):
            step.run()
    return answer


def system_tokens(threads: Threads) -> int:
    return len(threads.encode([SYSTEM], opens_answer=False))


def test_a_compacted_conversation_leaves_its_system_prompt_to_others(threads: Threads) -> None:
    first = answered(threads, LONG, "long")
    assert first.session.stats.num_compactions > 0
    second = answered(threads, "What do you see?", "short")
    assert abs(second.usage.cached_tokens - system_tokens(threads)) <= 2
    assert second.turn.rebuilt is None
    alone = answered(Threads(threads.memory), "What do you see?", "alone")
    assert second.content == alone.content
    assert second.session.tokens == alone.session.tokens
    assert {branch.thread for branch in threads.all_branches()} == {"long", "short"}


def test_conversations_that_begin_alike_read_it_once(threads: Threads) -> None:
    answers = [answered(threads, f"{LONG} {number}", f"thread {number}") for number in range(3)]
    assert [bool(answer.usage.cached_tokens) for answer in answers] == [False, True, True]


def test_owners_share_no_system_prompt(threads: Threads) -> None:
    answered(threads, LONG, "long")
    assert answered(threads, "What do you see?", "short", owner="bob").usage.cached_tokens == 0


def test_deleting_a_conversation_deletes_its_system_prompt(threads: Threads) -> None:
    answered(threads, LONG, "long")
    assert threads.delete("long")
    assert answered(threads, "What do you see?", "short").usage.cached_tokens == 0


def test_a_conversation_goes_on_from_itself_and_not_from_its_opening(threads: Threads) -> None:
    first = answered(threads, "What do you see?", "one")
    text = "And behind it?"
    messages = [
        SYSTEM,
        {"role": "user", "content": "What do you see?"},
        first.message,
        {"role": "user", "content": text},
    ]
    answer = ChatAnswer(threads, ChatRequest(messages, max_tokens=4, thread="one", owner="ada"))
    for step in answer_chat(answer):
        if isinstance(step, HostWork):
            step.run()
    assert answer.usage.cached_tokens > system_tokens(threads) + 8
