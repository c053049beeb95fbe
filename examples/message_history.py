"""RunnableWithMessageHistory with a model that reads only what is new: two people, one model, one history each.

python examples/message_history.py    less than a minute on two cores
"""

from __future__ import annotations

import warnings
from collections import defaultdict

from langchain_am_memory import ChatAMMemory
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables.history import RunnableWithMessageHistory

TURNS = (
    ("ada", "Hello, my name is Ada and I keep owls."),
    ("bob", "Hello, my name is Bob and I bake bread."),
    ("ada", "What do owls eat?"),
    ("bob", "How long does a dough rest?"),
    ("ada", "Do owls sleep in winter?"),
    ("bob", "Why does a loaf rise?"),
    ("ada", "What is my name?"),
    ("bob", "What is my name?"),
)


def main() -> None:
    warnings.simplefilter("ignore")  # LangChain recommends a checkpointer
    histories: dict[str, InMemoryChatMessageHistory] = defaultdict(InMemoryChatMessageHistory)
    model = ChatAMMemory(model="demo", trigger=("tokens", 160), temperature=0, max_tokens=32)
    chat = RunnableWithMessageHistory(model, lambda name: histories[name])
    for name, text in TURNS:
        answer = chat.invoke([HumanMessage(text)], {"configurable": {"session_id": name}})
        assert isinstance(answer, AIMessage)
        assert answer.usage_metadata is not None
        usage, figures = answer.usage_metadata, answer.response_metadata["am_memory"]
        num_known = usage["input_token_details"]["cache_read"]
        print(f"{name}    {text}\nmodel  {' '.join(answer.text.split())}")
        print(
            f"       [{usage['input_tokens'] - num_known} tokens read, {num_known} known; "
            f"{figures['kv_tokens']:.0f} in the cache for {figures['logical_tokens']}]\n"
        )


if __name__ == "__main__":
    main()
