"""The memory as an agent sees it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_am_memory import AMMemoryMiddleware, ChatAMMemory
from langchain_am_memory.compactions import EVENT, LOOKUP
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput

ROOMY = MemoryPolicy(trigger_tokens=3000, pinned=4, keep_recent=8, chunk_tokens=256)
TIGHT = MemoryPolicy(trigger_tokens=160, pinned=4, keep_recent=8, keep_ratio=0.25, chunk_tokens=256)
CONFIG: Any = {"configurable": {"thread_id": "mine"}}
LONG = {"messages": [HumanMessage("a message of more than the cache can hold. " * 6)]}

NewAgent = Callable[..., Any]


@pytest.fixture
def model(engine: TransformersEngine) -> ChatAMMemory:
    return ChatAMMemory(model=Memory(engine, ROOMY), max_tokens=6, temperature=0)


@pytest.fixture
def new_agent(model: ChatAMMemory) -> NewAgent:
    def make(*middleware: Any, **options: Any) -> Any:
        return create_agent(model, [], middleware=middleware, checkpointer=InMemorySaver(), **options)

    return make


def test_the_state_holds_the_figures_of_the_last_answer(new_agent: NewAgent) -> None:
    state = new_agent(AMMemoryMiddleware()).invoke(LONG, CONFIG)
    assert state["am_memory"]["logical_tokens"] > 200
    assert state["am_memory"] == state["messages"][-1].response_metadata["am_memory"]


async def test_the_asynchronous_state_does_so_too(new_agent: NewAgent) -> None:
    state = await new_agent(AMMemoryMiddleware()).ainvoke(LONG, CONFIG)
    assert state["am_memory"]["compactions"] == 0


def test_an_agent_has_a_policy_of_its_own(new_agent: NewAgent) -> None:
    state = new_agent(AMMemoryMiddleware(policy=TIGHT)).invoke(LONG, CONFIG)
    assert state["am_memory"]["compactions"] >= 1
    assert state["am_memory"]["kv_tokens"] <= 160


def test_a_compaction_is_in_the_agents_stream(new_agent: NewAgent) -> None:
    agent = new_agent(AMMemoryMiddleware(policy=TIGHT))
    events = [event for event in agent.stream(LONG, CONFIG, stream_mode="custom") if event["type"] == EVENT]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "started"
    assert "progress" in kinds
    assert kinds[-1] == "finished"
    assert events[-1]["kv_tokens_after"] < events[-1]["kv_tokens_before"]


@pytest.mark.usefixtures("looking_back")
def test_what_an_answer_looked_up_is_in_the_state_and_in_the_stream(new_agent: NewAgent) -> None:
    agent = new_agent(AMMemoryMiddleware(policy=TIGHT))
    events = [event for event in agent.stream(LONG, CONFIG, stream_mode="custom") if event["type"] == LOOKUP]
    figures = agent.get_state(CONFIG).values["am_memory"]
    assert figures["looked_up"] == events[0]["spans"]
    assert len(events) == 1


def test_another_threads_compactions_are_not(model: ChatAMMemory, new_agent: NewAgent) -> None:
    agent, events = new_agent(AMMemoryMiddleware()), []
    for event in agent.stream({"messages": [HumanMessage("hello")]}, CONFIG, stream_mode=["custom", "updates"]):
        events.append(event)
        model.bind(memory_policy=TIGHT).invoke(LONG["messages"], {"configurable": {"thread_id": "other"}})
    assert [kind for kind, _ in events] == ["updates"]


def test_the_agent_may_compact_its_own_memory(model: ChatAMMemory, new_agent: NewAgent) -> None:
    middleware = AMMemoryMiddleware(compact_tool=True)
    agent = new_agent(middleware)
    (tool,) = middleware.tools
    assert "nothing" in tool.invoke({}, CONFIG)
    agent.invoke(LONG, CONFIG)
    assert tool.invoke({}, CONFIG).startswith("Compacted ")
    after = agent.invoke({"messages": [HumanMessage("go on")]}, CONFIG)
    assert after["am_memory"]["compactions"] == 1
    assert after["messages"][-1].usage_metadata["input_token_details"]["cache_read"] > 200


def test_a_summariser_beside_it_is_warned_of_once(new_agent: NewAgent, caplog: pytest.LogCaptureFixture) -> None:
    summariser = SummarizationMiddleware(
        FakeListChatModel(responses=["a summary"]), trigger=("messages", 3), keep=("messages", 1)
    )
    agent = new_agent(summariser, AMMemoryMiddleware())
    with caplog.at_level(logging.WARNING, "am_memory"):
        for number in range(4):
            agent.invoke({"messages": [HumanMessage(f"message {number}")]}, CONFIG)
    assert [record.message.split(":")[0] for record in caplog.records] == ["a summary replaces messages"]


def test_it_can_take_the_place_of_another_middleware() -> None:
    assert AMMemoryMiddleware(name="SummarizationMiddleware").name == "SummarizationMiddleware"


def test_it_says_in_a_line_what_it_does() -> None:
    assert repr(AMMemoryMiddleware()) == "AMMemoryMiddleware(the model's policy)"
    assert repr(AMMemoryMiddleware(policy=TIGHT, compact_tool=True)) == f"AMMemoryMiddleware({TIGHT!r}, compact_memory)"


def test_another_model_is_refused() -> None:
    agent = create_agent(FakeListChatModel(responses=["hello"]), [], middleware=[AMMemoryMiddleware()])
    with pytest.raises(InvalidInput, match="not FakeListChatModel"):
        agent.invoke({"messages": [HumanMessage("hello")]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compact_tol": True}, r"AMMemoryMiddleware takes no compact_tol \(did you mean compact_tool\?\)"),
        ({"compact_tool": "yes"}, "compact_tool is 'yes': give True or False"),
        ({"policy": {"trigger_tokens": 600}}, "policy is .*: give a MemoryPolicy"),
    ],
    ids=str,
)
def test_what_is_no_setting_of_the_middleware_is_refused(given: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        AMMemoryMiddleware(**given)
