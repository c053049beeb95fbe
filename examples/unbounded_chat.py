"""A chat without an end: a conversation several times longer than its cache, and what is left of its first turn.

python examples/unbounded_chat.py
"""

from __future__ import annotations

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.events import CompactionFinished, Event

SHORT = Sampling(temperature=0, repetition_penalty=1.15)
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
    policy = MemoryPolicy(trigger_tokens=256, keep_ratio=0.25, keep_recent=32, pinned="sinks")
    memory = Memory.from_pretrained("demo", policy=policy, on_event=tell)
    session = memory.session("chat")
    session.append([{"role": "user", "content": "Hello! My name is Margaret and I live in Lisbon."}])
    session.append([{"role": "assistant", "content": "Nice to meet you, Margaret! How is Lisbon?"}])
    for question in QUESTIONS:
        session.append([{"role": "user", "content": question}])
        answer = "".join(piece.text for piece in session.generate(48, SHORT))
        print(f"you    {question}\nmodel  {answer}\n")
    session.append([{"role": "user", "content": "What is my name, and where do I live?"}])
    print("you    What is my name, and where do I live?\nmodel  ", end="")
    for piece in session.generate(16, SHORT):
        print(piece.text, end="", flush=True)
    stats = session.stats
    print(
        f"\n\n{stats.logical_tokens} tokens of conversation in {stats.kv_tokens:.0f}, "
        f"{stats.num_compactions} compactions, "
        f"{stats.kv_bytes / 2**20:.1f} MiB instead of {stats.exact_kv_bytes / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
