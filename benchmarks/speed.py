"""The cost of a memory: decoding, reading and compacting, as ratios within one run.

    python benchmarks/speed.py --model MODEL
    python benchmarks/speed.py --model MODEL --threads 1 --cpu-time     on a machine that does other work as well
    python benchmarks/speed.py --model MODEL --only ahead     the longest pause, an event beside decoding or not
    python benchmarks/speed.py --shape llama-3.1-8b --compacted-tokens 32000 --compact-tokens 1024 4096     on a GPU

Every figure is a median. What is compared is measured in turn (A, B, A, B...), so that noise hits all alike. The
baseline is transformers' own: DynamicCache with sdpa attention. Ceilings are bytes over the bandwidth of a large copy,
which is measured first. docs/performance.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from ceilings import bandwidth, peak_bytes, synchronize
from common import machine, table, uncompiled, write_json
from pauses import pauses
from shapes import SHAPES, CacheShape, random_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.letters import prose
from am_memory.engines.transformers import TransformersEngine
from am_memory.engines.transformers.attention import attend
from am_memory.engines.transformers.graphs import PATIENCE
from am_memory.engines.transformers.loading import load_model
from am_memory.events import CompactionProgress, CompactionStarted, Event
from am_memory.kv_cache.cache import KVCache
from am_memory.policy import SINK_TOKENS
from am_memory.solver.block import MAX_CHUNK_ELEMENTS, MAX_CHUNK_ELEMENTS_CPU

KEEP_RATIO = 0.1
WARM_UP = PATIENCE + 2
"""Tokens that do not count: on a GPU, a session's next ones come from a graph."""


@dataclass(frozen=True)
class Bench:
    """A memory, a text long enough, and the clock."""

    memory: Memory
    ids: list[int]
    clock: Callable[[], float]
    repeats: int
    is_compiled: bool

    @property
    def model(self) -> Any:
        return self.memory.engine.model

    def seconds(self, run: Callable[[], object]) -> float:
        synchronize()
        started = self.clock()
        run()
        synchronize()
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
                self.model(chunk, cache=cache, logits_to_keep=1)

    def decode(self, cache: object, num_tokens: int) -> float:
        """Seconds for each token, fed one by one, each the likeliest after the one before; two come first."""
        token = torch.tensor([[self.ids[0]]], device=self.model.device)

        def step() -> None:
            token.copy_(self.model(token, cache=cache).logits[:, -1:].argmax(-1))

        with torch.no_grad():
            for _ in range(2):
                step()
            return self.seconds(lambda: [step() for _ in range(num_tokens)]) / num_tokens


@dataclass(frozen=True)
class Context:
    """A compacted session, the same in int8, and stock caches as long: in what they hold, in what they stand for."""

    session: Session
    int8: Session
    physical: DynamicCache
    logical: DynamicCache

    @classmethod
    def of(cls, bench: Bench, compacted_tokens: int, exact_tokens: int) -> Context:
        num_tokens = compacted_tokens + exact_tokens
        session = bench.memory.session("decoding")
        session.append(bench.ids[: num_tokens + 1])
        int8 = session.fork(policy=bench.memory.policy.model_copy(update={"segment_dtype": "int8"}))
        for each in (session, int8):
            each.compact(compacted_tokens / num_tokens)
        caches = []
        with bench.stock_attention():
            for length in (round(session.stats.kv_tokens), num_tokens):
                caches.append(DynamicCache())
                bench.read(caches[-1], bench.ids[:length], bench.memory.engine.chunk_tokens)
        return cls(session, int8, *caches)

    @property
    def cache(self) -> KVCache:
        """To be forked, not written to."""
        return self.session._context.cache  # type: ignore[return-value]

    @property
    def int8_cache(self) -> KVCache:
        """To be forked, not written to."""
        return self.int8._context.cache  # type: ignore[return-value]

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes that attention reads for each token."""
        stock = {"DynamicCache": self.physical, "DynamicCache, logical": self.logical}
        return {
            "compacted": self.cache.nbytes,
            "int8": self.int8_cache.nbytes,
            **{name: sum(of.keys.nbytes + of.values.nbytes for of in each.layers) for name, each in stock.items()},
        }


def decoding(bench: Bench, context: Context, num_tokens: int) -> dict[str, float]:
    """Seconds for each decoded token."""
    uncompacted = bench.memory.engine.new_cache()
    bench.read(uncompacted, bench.ids[: context.physical.get_seq_length()], bench.memory.engine.chunk_tokens)

    def with_session() -> float:
        pieces = context.session.fork().generate(num_tokens + WARM_UP, Sampling())
        for _ in range(WARM_UP):
            next(pieces)
        return bench.seconds(lambda: [next(pieces) for _ in range(num_tokens)]) / num_tokens

    def with_stock(cache: DynamicCache) -> float:
        with bench.stock_attention():
            return bench.decode(copy.deepcopy(cache), num_tokens)

    runs = {
        "compacted": lambda: bench.decode(context.cache.fork(), num_tokens),
        "int8": lambda: bench.decode(context.int8_cache.fork(), num_tokens),
        "session": with_session,
        "uncompacted": lambda: bench.decode(uncompacted.fork(), num_tokens),
        "DynamicCache": lambda: with_stock(context.physical),
        "DynamicCache, our engine": lambda: bench.decode(copy.deepcopy(context.physical), num_tokens),
        "DynamicCache, logical": lambda: with_stock(context.logical),
    }
    eager = {name: partial(uncompiled, bench.model, run) for name, run in runs.items()}
    compiled = {"compiled": runs["compacted"], "session, compiled": with_session}
    return bench.medians(eager | (compiled if bench.is_compiled else {}))


def attention(bench: Bench, context: Context) -> dict[str, float]:
    """Seconds of one token's attention over the caches of all layers, without the model around it."""
    config = bench.model.config.get_text_config()
    layers = context.cache.compactable
    heads, tail = config.num_attention_heads, layers[0].exact_entries(layers[0].start, layers[0].get_seq_length())[0]
    query = torch.randn(1, heads, 1, tail.shape[-1], device=tail.device, dtype=tail.dtype)

    def with_ours(cache: KVCache) -> None:
        for layer in cache.compactable:
            key, value = layer.exact_entries(layer.start, layer.get_seq_length())
            attend(query, key[None], value[None], layer.slots, layer.scaling or 1.0)

    def with_stock(cache: DynamicCache) -> None:
        for layer in cache.layers:
            scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)

    with torch.no_grad():
        return bench.medians(
            {
                "compacted": lambda: bench.seconds(lambda: with_ours(context.cache)),
                "int8": lambda: bench.seconds(lambda: with_ours(context.int8_cache)),
                "DynamicCache": lambda: bench.seconds(lambda: with_stock(context.physical)),
                "DynamicCache, logical": lambda: bench.seconds(lambda: with_stock(context.logical)),
            }
        )


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

    chunk_tokens = memory.engine.chunk_tokens
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
        branch = session.fork()  # for the peak, which is measured apart: counting takes time
        compact = bench.seconds(lambda session=session: session.compact(1.0))
        rounds.append({"read": read, **stages.seconds, "compact": compact, "compact / read": compact / read})
        memory.delete(session.name)
    peak = peak_bytes(bench.model.device, lambda: branch.compact(1.0))
    took = {name: statistics.median(took[name] for took in rounds[1:]) for name in rounds[0]}
    chunk = MAX_CHUNK_ELEMENTS_CPU if bench.model.device.type == "cpu" else MAX_CHUNK_ELEMENTS
    formula = CacheShape.of(bench.model).event_bytes(num_tokens, chunk)
    return {**took, "peak_bytes": peak, "formula_bytes": formula}


Row = tuple[str, ...]
MEBIBYTE = 2**20
TITLES = {
    "compacted": "compacted cache",
    "compiled": "compacted cache, layers compiled",
    "int8": "compacted cache, segments in int8",
    "session": "compacted cache, by Session.generate",
    "session, compiled": "compacted cache, by Session.generate, layers compiled",
    "uncompacted": "our cache, nothing compacted",
    "DynamicCache, our engine": "DynamicCache on our engine",
    "DynamicCache": "DynamicCache, sdpa, equal physical length",
    "DynamicCache, logical": "DynamicCache, sdpa, equal logical length",
}


def decoding_rows(took: dict[str, float], nbytes: dict[str, int], weight_bytes: int, rate: float) -> Iterator[Row]:
    """The ceiling: all weights and the cache read once for each token, and nothing else."""
    for name, title in [(name, title) for name, title in TITLES.items() if name in took]:
        size = nbytes.get(name, nbytes["compacted" if "session" in name or name == "compiled" else "DynamicCache"])
        yield (
            f"decoding: {title}",
            f"{1 / took[name]:.1f}",
            f"{took['DynamicCache'] / took[name]:.2f}x",
            f"{size / MEBIBYTE:.1f}",
            f"{rate / (weight_bytes + size):.1f}",
        )


def attention_rows(took: dict[str, float], nbytes: dict[str, int], rate: float) -> Iterator[Row]:
    for name, seconds in took.items():
        yield (
            f"attention alone: {TITLES[name]}",
            f"{seconds * 1e3:.2f}",
            f"{took['DynamicCache'] / seconds:.2f}x",
            f"{nbytes[name] / seconds / 1e9:.1f}",
            f"{nbytes[name] / seconds / rate:.0%}",
        )


def reading_rows(took: dict[str, float], num_tokens: int) -> Iterator[Row]:
    titles = {
        "ours": "ours",
        "DynamicCache, chunks": "DynamicCache, the same chunks",
        "DynamicCache": "DynamicCache, at once",
    }
    for name, title in titles.items():
        ratio = f"{took['DynamicCache'] / took[name]:.2f}x"
        yield f"reading {num_tokens:,} tokens: {title}", f"{num_tokens / took[name]:.0f}", ratio


def event_row(took: dict[str, float], num_tokens: int) -> Row:
    queries = "predict" if "predict" in took else "repeat"
    stages = (f"{took[name]:.2f}" for name in ("read", "compact", queries, "score", "fit"))
    return (
        f"{num_tokens:,}",
        *stages,
        f"{took['compact / read']:.2f}x",
        f"{took['peak_bytes'] / MEBIBYTE:.0f}",
        f"{took['formula_bytes'] / MEBIBYTE:.0f}",
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a hub id, a folder, a .gguf file or demo")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape instead, in bfloat16")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--compile", action="store_true", help="decode on compiled layers, too; --only decoding")
    parser.add_argument("--only", choices=["decoding", "reading", "event", "ahead"], help="default: all four")
    parser.add_argument("--compacted-tokens", type=int, default=2300, help="of the context that is decoded on")
    parser.add_argument("--exact-tokens", type=int, default=700, help="of the same context, behind them")
    parser.add_argument("--decode-tokens", type=int, default=24)
    parser.add_argument("--read-tokens", type=int, default=2048)
    parser.add_argument("--compact-tokens", type=int, nargs="+", default=[1024], help="sizes of an event")
    parser.add_argument(
        "--ahead-tokens", type=int, default=128, help="of an event that is begun early; trigger: --read-tokens"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU instead of wall time; with --threads 1")
    parser.add_argument("--out", help="write the figures as JSON")
    return parser.parse_args()


def memory_of(args: argparse.Namespace, stages: Stages) -> tuple[Memory, list[int]]:
    """The memory, and tokens enough for everything."""
    num_tokens = max(args.compacted_tokens + args.exact_tokens, args.read_tokens, *args.compact_tokens) + 8
    policy = MemoryPolicy(
        trigger_tokens=1.0, pinned="sinks", keep_ratio=KEEP_RATIO, max_compact_tokens=num_tokens, originals="drop"
    )
    if args.shape is None:
        memory = Memory.from_pretrained(args.model, policy=policy, compile=args.compile, on_event=stages)
        ids = memory.tokenize(" ".join(prose(random.Random(0), num_tokens // 5)))
        assert len(ids) >= num_tokens
        return memory, ids
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(args.shape, args.layers, device, torch.bfloat16)
    _, tokenizer = load_model("demo", device="cpu")
    memory = Memory(TransformersEngine(model, tokenizer, compile=args.compile), policy, on_event=stages)
    numbers = random.Random(0)
    return memory, [numbers.randrange(1000, 40_000) for _ in range(num_tokens)]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    stages = Stages(clock)
    memory, ids = memory_of(args, stages)
    bench = Bench(memory, ids, clock, args.repeats, args.compile)
    rate = bandwidth(bench.model.device, clock)
    weight_bytes = sum(weight.nbytes for weight in bench.model.parameters())
    layers = bench.model.config.get_text_config().num_hidden_layers
    name = args.model if args.shape is None else f"{args.shape}, random weights, {layers} layers"
    unit = "CPU" if args.cpu_time else "wall"
    print(f"{name}, medians of {args.repeats}, {unit} time; {machine()}; memory {rate / 1e9:.1f} GB/s\n")
    results: dict[str, object] = {"name": name, "machine": machine(), "cpu_time": args.cpu_time, "bandwidth": rate}
    if args.only in (None, "decoding"):
        context = Context.of(bench, args.compacted_tokens, args.exact_tokens)
        took, alone, nbytes = decoding(bench, context, args.decode_tokens), attention(bench, context), context.nbytes
        results |= {"decoding": took, "attention": alone, "bytes": nbytes}
        print(
            f"{context.session.stats.kv_tokens:.0f} physical and {context.session.stats.logical_tokens} logical tokens"
        )
        header = ("what", "tokens/s", "of the baseline", "cache read, MiB/token", "tokens/s at most")
        show(header, decoding_rows(took, nbytes, weight_bytes, rate))
        header = ("what", "ms/token, all layers", "of the baseline", "GB/s", "of the memory's")
        show(header, attention_rows(alone, nbytes, rate))
    if args.only in (None, "reading"):
        results["reading"] = took = reading(bench, args.read_tokens)
        show(("what", "tokens/s", "of the baseline"), reading_rows(took, args.read_tokens))
    if args.only in (None, "event"):
        events = {size: event(bench, stages, size) for size in args.compact_tokens}
        results["event"] = events
        header = (f"tokens compacted {1 / KEEP_RATIO:.0f}x", "read, s", "compact, s", "queries", "score", "fit")
        show((*header, "compact / read", "peak, MiB", "formula, MiB"), (event_row(events[n], n) for n in events))
    if args.only in (None, "ahead"):
        results["ahead"] = paused = pauses(memory, ids, args.read_tokens, args.ahead_tokens, args.repeats)
        header = (f"compaction at {args.read_tokens:,} tokens, begun", "longest pause, s (wall)", "median token, ms")
        rows = ((name, f"{took[0]:.3f}", f"{took[1] * 1e3:.1f}", f"{took[2]:.2f}") for name, took in paused.items())
        show((*header, "all tokens, s"), rows)
    write_json(args.out, results)


def show(header: Row, rows: Iterable[Row]) -> None:
    print(table(header, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
