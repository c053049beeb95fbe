"""A LangChain agent with a tool, over a conversation several times longer than its cache.

python examples/langchain_agent.py             100 turns, some ten minutes on two cores
python examples/langchain_agent.py --turns 12  a shorter one
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Literal

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_am_memory import AMMemoryMiddleware, ChatAMMemory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver

from am_memory import MemoryPolicy

POLICY = MemoryPolicy(trigger_tokens=512, keep_ratio=0.25, keep_recent=32, max_compact_tokens=64)
QUESTIONS = (
    "Which ships are in the north harbour?",
    "What do owls eat?",
    "Which ships are in the south harbour?",
    "What is bread made of?",
    "Why is the sky blue?",
)
SHIPS = {"north": "the Vesper, the Halbrook and the Morwen", "south": "the Carrow and the Estmere"}


@tool
def ships(harbour: Literal["north", "south"]) -> str:
    """Look up the ships that lie in a harbour today."""
    return f"In the {harbour} harbour lie {SHIPS[harbour]}."


@wrap_model_call
def look_it_up(request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]) -> Any:
    """Force the tool for questions about ships: a model of 135 million parameters does not choose one by itself."""
    last = request.messages[-1]
    if isinstance(last, HumanMessage) and "ships" in last.text:
        request = request.override(tool_choice="ships")
    return handler(request)


def show(message: BaseMessage) -> None:
    match message:
        case AIMessage(tool_calls=[call]):
            print(f"       calls {call['name']}({call['args']})")
        case AIMessage():
            print(f"model  {' '.join(message.text.split())}")
        case ToolMessage():
            print(f"tool   {message.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=100)
    args = parser.parse_args()
    agent = create_agent(
        ChatAMMemory(model="demo", temperature=0, repetition_penalty=1.15, max_tokens=24),
        tools=[ships],
        system_prompt="You are a helpful assistant who answers questions.",
        middleware=[AMMemoryMiddleware(policy=POLICY), look_it_up],
        checkpointer=InMemorySaver(),
    )
    config: Any = {"configurable": {"thread_id": "harbour"}}
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(args.turns)]
    for number, question in enumerate(["Hello, my name is Margaret.", *questions, "What is my name?"], 1):
        print(f"\n{number:3d}    {question}")
        turn = {"messages": [HumanMessage(question)]}
        for mode, news in agent.stream(turn, config, stream_mode=["updates", "custom"]):
            if mode == "updates":
                for update in news.values():
                    for message in update.get("messages", ()):
                        show(message)
            elif news.get("event") == "finished":
                print(f"       [cache from {news['kv_tokens_before']:.0f} to {news['kv_tokens_after']:.0f} tokens]")
    figures = agent.get_state(config).values["am_memory"]
    print(
        f"\n{figures['logical_tokens']} tokens of the agent's conversation in {figures['kv_tokens']:.0f}, "
        f"{figures['compactions']} compactions, {figures['kv_bytes'] / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
