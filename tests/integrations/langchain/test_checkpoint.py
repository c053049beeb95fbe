"""Checkpoints and caches of a thread are deleted, copied and pruned together."""

from __future__ import annotations

from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_am_memory import AMMemoryCheckpointer, ChatAMMemory
from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver

from am_memory import Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine

CONFIG: Any = {"configurable": {"thread_id": "mine"}}
HELLO: Any = {"messages": [HumanMessage("hello")]}


@pytest.fixture
def model(engine: TransformersEngine) -> ChatAMMemory:
    return ChatAMMemory(model=Memory(engine, MemoryPolicy(trigger_tokens=2000)), max_tokens=4, temperature=0)


def test_an_agent_goes_on_from_its_checkpoints(model: ChatAMMemory) -> None:
    agent = create_agent(model, [], checkpointer=AMMemoryCheckpointer(InMemorySaver(), model))
    agent.invoke(HELLO, CONFIG)
    state = agent.invoke({"messages": [HumanMessage("again")]}, CONFIG)
    assert len(state["messages"]) == 4
    assert state["messages"][-1].usage_metadata["input_token_details"]["cache_read"] > 20
    assert len(list(agent.get_state_history(CONFIG))) > 4


async def test_so_does_an_asynchronous_one(model: ChatAMMemory) -> None:
    checkpointer = AMMemoryCheckpointer(InMemorySaver(), model)
    agent = create_agent(model, [], checkpointer=checkpointer)
    await agent.ainvoke(HELLO, CONFIG)
    assert [state async for state in agent.aget_state_history(CONFIG)]
    await checkpointer.adelete_thread("mine")
    assert model.threads().names() == []


def test_a_deleted_thread_is_gone_from_both(model: ChatAMMemory) -> None:
    checkpointer = AMMemoryCheckpointer(InMemorySaver(), model)
    create_agent(model, [], checkpointer=checkpointer).invoke(HELLO, CONFIG)
    assert model.threads().names() == ["mine"]
    checkpointer.delete_thread("mine")
    assert checkpointer.get_tuple(CONFIG) is None
    assert model.threads().names() == []


def test_everything_that_a_checkpointer_does_is_passed_on() -> None:
    """Methods that this class inherits only call methods that it overrides."""
    inherited = {name for name in vars(BaseCheckpointSaver) if not name.startswith("_")} - set(
        vars(AMMemoryCheckpointer)
    )
    assert inherited == {"serde", "get", "aget"}
