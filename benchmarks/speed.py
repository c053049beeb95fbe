"""What a memory costs: decoding, reading and compacting, as ratios within one run.

    python benchmarks/speed.py --model MODEL
    python benchmarks/speed.py --model MODEL --threads 1 --cpu-time     on a machine that does other work as well

Every figure is a median. What is compared is measured in turn (A, B, A, B...), so that noise hits all alike. The
baseline is transformers' own: DynamicCache with sdpa attention.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from common import machine, table, write_json
from transformers import DynamicCache

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.demo import prose
from am_memory.events import CompactionProgress, CompactionStarted, Event
from am_memory.policy import SINK_TOKENS

POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", keep_ratio=0.1, max_compact_tokens=800)
COMPACTED_TOKENS, EXACT_TOKENS = 2300, 700
"""Of the context that is decoded on: 230 slots for each head and 700 exact tokens."""


@dataclass(frozen=True)
class Bench:
    """A memory, a text long enough, and the clock."""

    memory: Memory
    ids: list[int]
    clock: Callable[[], float]
    repeats: int

    @property
    def model(self) -> Any:
        return self.memory.engine.model

    def seconds(self, run: Callable[[], object]) -> float:
        started = self.clock()
        run()
        return self.clock() - started

    def medians(self, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Median of each, measured in turn, after one round that does not count."""
        rounds = [{name: run() for name, run in runs.items()} for _ in range(self.repeats + 1)]
        return {name: statistics.median(times[name] for times in rounds[1:]) for name in runs}

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """transformers' own sdpa attention in place of ours."""
        ours = self.model.config._attn_implementation
        self.model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            self.model.set_attn_implementation(ours)

    def read(self, cache: object, ids: list[int], chunk_tokens: int) -> None:
        with torch.no_grad():
            for start in range(0, len(ids), chunk_tokens):
                chunk = torch.tensor([ids[start : start + chunk_tokens]], device=self.model.device)
                self.model(chunk, past_key_values=cache, logits_to_keep=1)

    def decode(self, cache: object, num_tokens: int) -> float:
        """Seconds for each token, fed one by one, each the likeliest after the one before; two come first."""
        token = torch.tensor([[self.ids[0]]], device=self.model.device)

        def step() -> None:
            token.copy_(self.model(token, past_key_values=cache).logits[:, -1:].argmax(-1))

        with torch.no_grad():
            for _ in range(2):
                step()
            return self.seconds(lambda: [step() for _ in range(num_tokens)]) / num_tokens


def decoding(bench: Bench, num_tokens: int = 24) -> dict[str, float]:
    """Seconds for each decoded token, at one physical length of the cache."""
    memory = bench.memory
    session = memory.session("decoding")
    session.append(bench.ids[: COMPACTED_TOKENS + EXACT_TOKENS + 1])
    session.compact(COMPACTED_TOKENS / (COMPACTED_TOKENS + EXACT_TOKENS))
    physical = round(session.stats.kv_tokens)

    def with_session() -> float:
        pieces = session.fork().generate(num_tokens + 3, Sampling())
        for _ in range(3):
            next(pieces)
        return bench.seconds(lambda: [next(pieces) for _ in range(num_tokens)]) / num_tokens

    uncompacted, dynamic = memory.engine.new_cache(), DynamicCache()
    for cache in (uncompacted, dynamic):
        bench.read(cache, bench.ids[:physical], physical)

    def with_stock() -> float:
        with bench.stock_attention():
            return bench.decode(copy.deepcopy(dynamic), num_tokens)

    runs = {
        "compacted": lambda: bench.decode(session.fork()._context.cache, num_tokens),
        "session": with_session,
        "uncompacted": lambda: bench.decode(uncompacted.fork(), num_tokens),
        "DynamicCache": with_stock,
        "DynamicCache, our engine": lambda: bench.decode(copy.deepcopy(dynamic), num_tokens),
    }
    return {"physical_tokens": physical, **bench.medians(runs)}


def reading(bench: Bench, num_tokens: int) -> dict[str, float]:
    """Seconds to read a prompt: ours, and DynamicCache in the same chunks and at once."""
    memory, ids = bench.memory, bench.ids[: num_tokens + 1]

    def ours() -> float:
        session = memory.session()
        took = bench.seconds(lambda: session.append(ids))
        memory.delete(session.name)
        return took

    def dynamic(chunk_tokens: int) -> float:
        cache = DynamicCache()
        with bench.stock_attention():
            return bench.seconds(lambda: bench.read(cache, ids[:-1], chunk_tokens))

    chunk_tokens = memory.policy.chunk_tokens
    return bench.medians(
        {
            "ours": ours,
            "DynamicCache, chunks": lambda: dynamic(chunk_tokens),
            "DynamicCache": lambda: dynamic(num_tokens),
        }
    )


@dataclass
class Stages:
    """A listener: when the stages of the last compaction ended."""

    clock: Callable[[], float]
    ends: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        match event:
            case CompactionStarted():
                self.ends = {"start": self.clock()}
            case CompactionProgress(_, stage, _, _):
                self.ends[stage] = self.clock()

    @property
    def seconds(self) -> dict[str, float]:
        return {stage: end - start for (_, start), (stage, end) in pairwise(self.ends.items())}


def event(bench: Bench, stages: Stages, num_tokens: int) -> dict[str, float]:
    """Seconds of one compaction, by stage, and of reading its block once; the ratio is a median of its own."""
    memory, rounds = bench.memory, []
    for _ in range(bench.repeats + 1):
        session = memory.session()
        read = bench.seconds(lambda session=session: session.append(bench.ids[: num_tokens + SINK_TOKENS + 1]))
        compact = bench.seconds(lambda session=session: session.compact(1.0))
        rounds.append({"read": read, **stages.seconds, "compact": compact, "compact / read": compact / read})
        memory.delete(session.name)
    return {name: statistics.median(took[name] for took in rounds[1:]) for name in rounds[0]}


Row = tuple[str, str, str]


def decoding_rows(took: dict[str, float]) -> list[Row]:
    titles = {
        "compacted": "compacted cache",
        "session": "compacted cache, by Session.generate",
        "uncompacted": "our cache, nothing compacted",
        "DynamicCache, our engine": "DynamicCache on our engine",
        "DynamicCache": "DynamicCache, sdpa",
    }
    return [
        (
            f"decoding at {took['physical_tokens']} physical tokens: {title}",
            f"{1 / took[name]:.1f} tokens/s",
            f"{took['DynamicCache'] / took[name]:.2f}x",
        )
        for name, title in titles.items()
    ]


def reading_rows(took: dict[str, float], num_tokens: int) -> list[Row]:
    titles = {
        "ours": "ours",
        "DynamicCache, chunks": "DynamicCache, the same chunks",
        "DynamicCache": "DynamicCache, at once",
    }
    return [
        (
            f"reading {num_tokens:,} tokens: {title}",
            f"{num_tokens / took[name]:.0f} tokens/s",
            f"{took['DynamicCache'] / took[name]:.2f}x",
        )
        for name, title in titles.items()
    ]


def event_rows(took: dict[str, float], num_tokens: int) -> list[Row]:
    stages = ", ".join(f"{stage} {took[stage]:.2f}" for stage in ("repeat", "score", "fit"))
    return [
        (
            f"compacting {num_tokens:,} tokens {1 / POLICY.keep_ratio:.0f}x",
            f"{took['compact']:.2f} s ({stages})",
            f"{took['compact / read']:.2f}x the {took['read']:.2f} s of reading them",
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", choices=["decoding", "reading", "event"], help="default: all three")
    parser.add_argument("--read-tokens", type=int, default=2048)
    parser.add_argument("--compact-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU instead of wall time; with --threads 1")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    stages = Stages(clock)
    memory = Memory.from_pretrained(args.model, policy=POLICY, on_event=stages)
    ids = memory.tokenize(" ".join(prose(random.Random(0), 400)))
    bench = Bench(memory, ids, clock, args.repeats)
    unit = "CPU" if args.cpu_time else "wall"
    print(f"{args.model}, medians of {args.repeats}, {unit} time; {machine()}\n")
    results: dict[str, dict[str, float]] = {}
    if args.only in (None, "decoding"):
        results["decoding"] = decoding(bench)
        show(decoding_rows(results["decoding"]))
    if args.only in (None, "reading"):
        results["reading"] = reading(bench, args.read_tokens)
        show(reading_rows(results["reading"], args.read_tokens))
    if args.only in (None, "event"):
        results["event"] = event(bench, stages, args.compact_tokens)
        show(event_rows(results["event"], args.compact_tokens))
    write_json(args.out, {"model": args.model, "machine": machine(), "cpu_time": args.cpu_time, **results})


def show(rows: list[Row]) -> None:
    print(table(("what", "measured", "of the baseline"), rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
