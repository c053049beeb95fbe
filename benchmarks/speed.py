"""What a memory costs: decoding, reading and compacting, as ratios within one run.

    python benchmarks/speed.py --model MODEL

Each figure is a median; the sides of a ratio are measured in turn (A, B, A, B...), so that noise hits all of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, table, write_json
from transformers import DynamicCache

from am_memory import Memory, MemoryPolicy, Session
from am_memory.demo import prose
from am_memory.events import CompactionReport

POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", keep_ratio=0.1, max_compact_tokens=800)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def alternate(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median of each, measured in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            took = run()
            if number:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def text_tokens(memory: Memory, count: int) -> list[int]:
    ids: list[int] = []
    rng = random.Random(0)
    while len(ids) < count:
        ids += memory.tokenize(" ".join(prose(rng, 100)))
    return ids[:count]


def decode(model: torch.nn.Module, cache: object, num_tokens: int) -> float:
    """Seconds for each token, fed one by one."""
    with torch.no_grad():
        for number in range(2):
            model(torch.tensor([[100 + number]]), past_key_values=cache)
        return (
            seconds(
                lambda: [model(torch.tensor([[100 + number]]), past_key_values=cache) for number in range(num_tokens)]
            )
            / num_tokens
        )


def decoding(memory: Memory, repeats: int) -> dict[str, float]:
    """Seconds for each token with 1,024 physical tokens: compacted, ours uncompacted, DynamicCache."""
    ids, model = text_tokens(memory, 4000), memory.engine.model
    compacted = memory.session("decode")
    compacted.append(ids[:3001])
    compacted.compact(0.8)
    physical = round(compacted.stats.kv_tokens)

    def with_dynamic() -> float:
        cache = DynamicCache()
        with torch.no_grad():
            model(torch.tensor([ids[:physical]]), past_key_values=cache, logits_to_keep=1)
        return decode(model, cache, 24)

    def with_exact() -> float:
        cache = memory.engine.new_cache()
        memory.engine.forward(cache, ids[:physical])
        return decode(model, cache, 24)

    runs = {
        "compacted": lambda: decode(model, compacted.fork()._context.cache, 24),
        "exact": with_exact,
        "DynamicCache": with_dynamic,
    }
    return {"physical_tokens": physical, **alternate(runs, repeats)}


def reading(memory: Memory, repeats: int, num_tokens: int = 2048) -> dict[str, float]:
    """Seconds to read a prompt: ours, and DynamicCache in the same chunks and at once."""
    ids, model, chunk = text_tokens(memory, num_tokens), memory.engine.model, memory.policy.chunk_tokens

    def ours() -> float:
        session = memory.session()
        took = seconds(lambda: session.append(ids))
        memory.delete(session.name)
        return took

    def dynamic(size: int) -> float:
        cache = DynamicCache()

        def read() -> None:
            with torch.no_grad():
                for start in range(0, num_tokens, size):
                    model(torch.tensor([ids[start : start + size]]), past_key_values=cache, logits_to_keep=1)

        return seconds(read)

    runs = {"ours": ours, "DynamicCache, chunks": lambda: dynamic(chunk), "DynamicCache": lambda: dynamic(num_tokens)}
    return alternate(runs, repeats)


def event(memory: Memory, repeats: int, num_tokens: int = 1024) -> dict[str, float]:
    """Seconds of one compaction of 1,024 tokens by stage, and of reading them once."""
    ids = text_tokens(memory, num_tokens + 5)
    stages: dict[str, list[float]] = {"read": [], "repeat": [], "score": [], "fit": []}
    for number in range(repeats + 1):
        session: Session = memory.session()
        read = seconds(lambda session=session: session.append(ids))
        report: CompactionReport = session.compact(1.0)
        memory.delete(session.name)
        if number:
            took = (read, report.query_seconds, report.score_seconds, report.fit_seconds)
            for stage, value in zip(stages, took, strict=True):
                stages[stage].append(value)
    medians = {stage: statistics.median(values) for stage, values in stages.items()}
    events = [sum(values) for values in zip(stages["repeat"], stages["score"], stages["fit"], strict=True)]
    ratios = [took / read for took, read in zip(events, stages["read"], strict=True)]
    return {**medians, "event": statistics.median(events), "event / read": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=POLICY)
    results = {
        "decoding": decoding(memory, args.repeats),
        "reading": reading(memory, args.repeats),
        "event": event(memory, args.repeats),
    }
    write_json(args.out, results)
    speed, read, cost = results["decoding"], results["reading"], results["event"]
    rows = [
        (
            f"decoding, compacted to {speed['physical_tokens']} tokens",
            f"{1 / speed['compacted']:.1f} tokens/s",
            f"{speed['DynamicCache'] / speed['compacted']:.2f}x",
        ),
        (
            "decoding, ours uncompacted, same length",
            f"{1 / speed['exact']:.1f} tokens/s",
            f"{speed['DynamicCache'] / speed['exact']:.2f}x",
        ),
        ("decoding, DynamicCache with sdpa, same length", f"{1 / speed['DynamicCache']:.1f} tokens/s", "1x"),
        ("reading 2,048 tokens", f"{2048 / read['ours']:.0f} tokens/s", f"{read['DynamicCache'] / read['ours']:.2f}x"),
        (
            "reading, DynamicCache in the same chunks",
            f"{2048 / read['DynamicCache, chunks']:.0f} tokens/s",
            f"{read['DynamicCache'] / read['DynamicCache, chunks']:.2f}x",
        ),
        ("reading, DynamicCache at once", f"{2048 / read['DynamicCache']:.0f} tokens/s", "1x"),
        (
            "compacting 1,024 tokens",
            f"{cost['event']:.2f} s (repeat {cost['repeat']:.2f}, score {cost['score']:.2f}, fit {cost['fit']:.2f})",
            f"{cost['event / read']:.2f}x the {cost['read']:.2f} s of reading them",
        ),
    ]
    print(f"{args.model}, medians of {args.repeats}; {machine()}\n\n{table(('what', 'measured', 'ratio'), rows)}")


if __name__ == "__main__":
    main()
