"""One agent reads, another one writes: what the first remembers is handed over as a compact text, and read only once.

python examples/hand_over.py             half a minute on two cores
"""

from __future__ import annotations

from langchain_am_memory import ChatAMMemory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from am_memory.cli.letters import letters


def main() -> None:
    reader = ChatAMMemory(model="demo", temperature=0, repetition_penalty=1.0, max_tokens=12)
    messages: list[BaseMessage] = []
    for letter in letters(seed=0, num_letters=3, num_facts=1, num_sentences=12):
        messages.append(HumanMessage(f"Read this letter, and say that you have:\n{letter.text}"))
        messages.append(reader.invoke(messages, {"configurable": {"thread_id": "reading"}}))

    notes = reader.threads().compact_text("reading", "the letters")
    print(f"handed over: {notes}")

    writer = ChatAMMemory(model=reader.memory, temperature=0, repetition_penalty=1.0, max_tokens=32)
    asked = HumanMessage("Which ships and towns are the letters about?")
    for mounts in ([], [notes.name]):
        answer = writer.invoke([asked], mounts=mounts)
        assert isinstance(answer, AIMessage)
        usage = answer.usage_metadata
        assert usage is not None
        print(f"\nwith {mounts or 'nothing mounted'}: {usage['input_tokens']} tokens in the prompt\n{answer.text}")


if __name__ == "__main__":
    main()
