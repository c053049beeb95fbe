"""A long reasoning loop through transformers' own `generate`: only the cache is another.

python examples/reasoning_loop.py
"""

from __future__ import annotations

from transformers import TextStreamer

from am_memory import Memory, MemoryPolicy
from am_memory.events import CompactionFinished, Event


def main() -> None:
    events: list[Event] = []
    memory = Memory.from_pretrained(
        "demo", policy=MemoryPolicy(trigger_tokens=192, keep_ratio=0.25, keep_recent=32), on_event=events.append
    )
    model, tokenizer = memory.engine.model, memory.engine.tokenizer
    problem = [{"role": "user", "content": "Write a long story about a lighthouse keeper, in many scenes."}]
    inputs = tokenizer.apply_chat_template(problem, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    cache = memory.cache()
    model.generate(
        **inputs,
        cache=cache,
        max_new_tokens=400,
        min_new_tokens=400,
        do_sample=True,
        temperature=0.7,
        top_p=0.95,
        repetition_penalty=1.1,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    num_compactions = sum(isinstance(event, CompactionFinished) for event in events)
    print(f"\n{cache.num_tokens} tokens in {cache.kv_tokens:.0f}, {num_compactions} compactions on the way")


if __name__ == "__main__":
    main()
