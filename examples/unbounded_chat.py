"""A chat without an end: a conversation several times longer than its cache, and what it knows of its first turn.

python examples/unbounded_chat.py
"""

from __future__ import annotations

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.events import CompactionFinished, Event

CHATTY = Sampling(temperature=0, repetition_penalty=1.15)
"""A model of 135 million parameters repeats itself without a penalty."""
QUESTIONS = (
    "Tell me something about owls.",
    "What is bread made of?",
    "Why is the sky blue?",
    "Describe a forest in winter.",
    "How does a bicycle stay upright?",
    "What do bees do in the cold months?",
)


def tell(event: Event) -> None:
    if isinstance(event, CompactionFinished):
        report = event.report
        print(f"    [compacted {report.end - report.start} tokens into {report.num_slots:.0f} slots per head]")


def main() -> None:
    memory = Memory.from_pretrained("demo", policy=MemoryPolicy(trigger_tokens=512), on_event=tell)
    session = memory.session("chat")
    session.append([{"role": "user", "content": "The code of the safe is 4821."}])
    session.append([{"role": "assistant", "content": "I shall keep it in mind."}])
    print(f"before: {ask_about_the_code(session)}\n")
    for question in QUESTIONS:
        session.append([{"role": "user", "content": question}])
        answer = "".join(piece.text for piece in session.generate(96, CHATTY))
        print(f"you    {question}\nmodel  {answer}\n")
    print(f"after: {ask_about_the_code(session)}")
    stats = session.stats
    print(
        f"\n{stats.logical_tokens} tokens of conversation in {stats.kv_tokens:.0f}, "
        f"{stats.num_compactions} compactions, "
        f"{stats.kv_bytes / 2**20:.1f} MiB instead of {stats.exact_kv_bytes / 2**20:.1f} MiB"
    )


def ask_about_the_code(session: Session) -> str:
    """Ask on a branch, so that the conversation does not hold the answer a second time."""
    branch = session.fork()
    branch.append([{"role": "user", "content": "What is the code of the safe?"}])
    return "".join(piece.text for piece in branch.generate(12, Sampling(temperature=0))).strip()


if __name__ == "__main__":
    main()
