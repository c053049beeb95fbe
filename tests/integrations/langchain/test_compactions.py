"""Compactions reach LangChain's callbacks, whatever the call path."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from langchain.agents import create_agent
from langchain_am_memory import ChatAMMemory
from langchain_am_memory.compactions import EVENT, LOOKUP, listener
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import CompactionStarted, ReadProgress

TIGHT = MemoryPolicy(trigger_tokens=160, recall_tokens=32, pinned=4, keep_recent=8, keep_ratio=0.25, chunk_tokens=256)
LONG = "a message of more than the cache can hold. " * 6


class Heard(BaseCallbackHandler):
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any], UUID]] = []
        self.runs: list[UUID] = []

    def on_chat_model_start(self, *args: Any, run_id: UUID, **kwargs: Any) -> None:
        self.runs.append(run_id)

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.events.append((name, data, run_id))


class HeardAsync(AsyncCallbackHandler):
    def __init__(self) -> None:
        self.kinds: list[str] = []

    async def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **kwargs: Any) -> None:
        self.kinds.append(data["event"])


@pytest.fixture
def model(engine: TransformersEngine) -> ChatAMMemory:
    return ChatAMMemory(model=Memory(engine, TIGHT), max_tokens=4, temperature=0)


def test_a_callback_handler_hears_of_start_progress_and_end(model: ChatAMMemory) -> None:
    heard = Heard()
    model.invoke(LONG, {"callbacks": [heard]})
    kinds = [data["event"] for _, data, _ in heard.events]
    assert kinds[0] == "started"
    assert "progress" in kinds
    assert kinds[-1] == "finished"
    assert {name for name, _, _ in heard.events} == {EVENT}
    assert {run_id for _, _, run_id in heard.events} == set(heard.runs)
    assert heard.events[-1][1]["kv_tokens_after"] < heard.events[-1][1]["kv_tokens_before"]


def test_one_that_is_begun_ahead_is_told_of_in_the_callers_run(engine: TransformersEngine) -> None:
    policy, heard = TIGHT.model_copy(update={"ahead_tokens": 12}), Heard()
    answer = ChatAMMemory(model=Memory(engine, policy), max_tokens=4, temperature=0).invoke(
        LONG, {"callbacks": [heard]}
    )
    kinds = [data["event"] for _, data, _ in heard.events]
    assert kinds.index("started") < kinds.index("progress") < kinds.index("finished")
    assert {run_id for _, _, run_id in heard.events} == set(heard.runs)
    assert answer.response_metadata["am_memory"]["compactions"] == kinds.count("finished") > 0


@pytest.mark.usefixtures("looking_back")
def test_a_callback_handler_hears_what_was_looked_up(model: ChatAMMemory) -> None:
    heard = Heard()
    answer = model.invoke(LONG, {"callbacks": [heard]})
    (data,) = [data for name, data, _ in heard.events if name == LOOKUP]
    (span,) = data["spans"]
    assert span["text"] in f"<|im_start|>user\n{LONG}"
    assert answer.response_metadata["am_memory"]["looked_up"] == [span]
    assert answer.response_metadata["am_memory"]["recalled_tokens"] == 20


async def test_so_does_one_of_an_asynchronous_call(model: ChatAMMemory) -> None:
    heard, heard_async = Heard(), HeardAsync()
    await model.ainvoke(LONG, {"callbacks": [heard, heard_async]})
    assert heard_async.kinds[0] == "started"
    assert heard_async.kinds[-1] == "finished"
    assert heard_async.kinds == [data["event"] for _, data, _ in heard.events]


async def test_an_agents_stream_of_events_has_them_before_the_answer(model: ChatAMMemory) -> None:
    agent, told = create_agent(model, []), {"messages": [HumanMessage(LONG)]}
    kinds = [(event["event"], event["name"]) async for event in agent.astream_events(told, version="v2")]
    assert ("on_custom_event", EVENT) in kinds
    answer = next(index for index, (kind, _) in enumerate(kinds) if kind == "on_chat_model_stream")
    assert kinds.index(("on_custom_event", EVENT)) < answer


def test_only_the_compactions_of_the_thread_are_told() -> None:
    told: list[dict[str, Any]] = []
    listen = listener("mine", told.append)
    for event in (
        CompactionStarted("mine", 0, 8, 9.0),
        CompactionStarted("other", 0, 8, 9.0),
        ReadProgress("mine", 1, 2),
    ):
        listen(event)
    assert [(said["event"], said["session"]) for said in told] == [("started", "mine")]
