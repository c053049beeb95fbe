"""A research agent in one long turn: it calls for page after page, and their text overflows its cache many times.

python examples/research_loop.py             some three minutes on two cores
python examples/research_loop.py --pages 8   a shorter one
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, ModelResponse, wrap_model_call
from langchain_am_memory import AMMemoryMiddleware, ChatAMMemory
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool

from am_memory import MemoryPolicy
from am_memory.cli.letters import letters

POLICY = MemoryPolicy(trigger_tokens=768, keep_ratio=0.15, compact_fraction=0.75, max_compact_tokens=300)


def make_agent(pages: Iterator[str], num_pages: int) -> Any:
    @tool
    def next_page() -> str:
        """The next page of the harbour's chronicle."""
        return next(pages)

    @wrap_model_call
    def read_on(request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]) -> Any:
        """A model of 135 million parameters does not choose a tool by itself: it is made to, until all is read."""
        num_read = sum(isinstance(message, ToolMessage) for message in request.messages)
        return handler(request.override(tool_choice="next_page" if num_read < num_pages else "none"))

    model = ChatAMMemory(model="demo", temperature=0, repetition_penalty=1.0, max_tokens=24)
    return create_agent(model, [next_page], middleware=[AMMemoryMiddleware(policy=POLICY), read_on])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=18)
    args = parser.parse_args()
    written = letters(seed=0, num_letters=args.pages, num_facts=1, num_sentences=16)
    agent = make_agent(iter([letter.text for letter in written]), args.pages)
    told = {"messages": [HumanMessage("Read the whole chronicle, page by page, and say what it is about.")]}
    num_pages = 0
    for mode, news in agent.stream(told, {"recursion_limit": 10 * args.pages}, stream_mode=["updates", "custom"]):
        if mode == "custom":
            if news.get("event") == "finished":
                print(f"       [cache from {news['kv_tokens_before']:.0f} to {news['kv_tokens_after']:.0f} tokens]")
        elif "tools" in news:
            num_pages += 1
            print(f"page {num_pages:2d} names the ship {written[num_pages - 1].facts[0].town}", flush=True)
        elif "model" in news:
            last = news["model"]["messages"][-1]
    print(f"\nmodel  {last.text}")
    figures = last.response_metadata["am_memory"]
    print(
        f"\n{num_pages} pages, {figures['logical_tokens']} tokens, read through a cache of "
        f"{POLICY.trigger_tokens}: {figures['compactions']} compactions, {figures['kv_bytes'] / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
