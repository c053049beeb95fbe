"""The llama.cpp engine: a long text in few cells, and what reading, decoding and compacting cost.

    python benchmarks/llama_engine.py long  --model MODEL     12,288 tokens with a limit of 768 cells
    python benchmarks/llama_engine.py kl    --model MODEL     KL against the full cache, by number of compactions
    python benchmarks/llama_engine.py speed --model MODEL --tokens 4000     beside llama_cpp.Llama

The long text is English prose that comes with Python, `pydoc_data.topics`. For recall and KL there is `recall.py
--engine llama_cpp`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import get_args

import llama_cpp
import torch
from common import kl_divergence, machine, table
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.engines.base import SessionCache
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.llama_cpp.engine import Heads
from am_memory.engines.model_files import gguf_path
from am_memory.kv_cache.slots import Segment, Slots

NUM_TOKENS, NUM_JUDGED, NUM_CELLS, STEP = 12_288, 2_048, 768, 64
SINKS = 4
RAGGED = "AM, ragged heads"
KL_SCHEMES = {"drop": None, "eviction per head": "nothing", "AM, no bias": "values"}
KL_SCHEMES |= {"AM": "bias_and_values", RAGGED: "bias_and_values"}
COUNTS, BLOCK, KEPT, NUM_AFTER = (1, 2, 4, 8), 256, 64, 128
LONG = MemoryPolicy(trigger_tokens=NUM_CELLS, keep_ratio=0.1, pinned=SINKS)
SCHEMES = {
    "AM": {},
    "AM, no recall": {"originals": "drop"},
    "AM, no bias": {"experiments": Experiments(fit="values")},
    "eviction per head": {"experiments": Experiments(fit="nothing")},
}
SCHEMES |= {"AM, OMP, ridge 0.5": {"key_selection": "omp", "ridge": 0.5}}
BY_QUARTERS = {"compact_fraction": 0.25, "keep_ratio": 0.2, "max_compact_tokens": 128}
SCHEMES |= {"AM, OMP, ridge 2, by quarters": {"key_selection": "omp", "ridge": 2.0, **BY_QUARTERS}}
SCHEMES |= {"eviction per head, by quarters": {"experiments": Experiments(fit="nothing"), **BY_QUARTERS}}


def text_tokens(memory: Memory) -> list[int]:
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return memory.tokenize(text[: 8 * NUM_TOKENS])[:NUM_TOKENS]


def nll(logits: Tensor, token_ids: list[int]) -> Tensor:
    return -logits.log_softmax(-1)[torch.arange(len(token_ids)), torch.tensor(token_ids)]


def streamed(session: Session, token_ids: list[int]) -> float:
    """Mean over the last tokens, each predicted before it is read."""
    first = len(token_ids) - NUM_JUDGED
    session.append(token_ids[:first])
    losses = []
    for start in range(first, len(token_ids), STEP):
        chunk = token_ids[start : start + STEP]
        losses.append(nll(session.logits(chunk), chunk))
        session.append(chunk)
    return float(torch.cat(losses).mean())


def windowed(memory: Memory, token_ids: list[int]) -> float:
    """The same with the first tokens and as many of the last ones as there are cells, read again for each step."""
    losses = []
    for start in range(len(token_ids) - NUM_JUDGED, len(token_ids), STEP):
        session, chunk = memory.scratch(), token_ids[start : start + STEP]
        session.append([*token_ids[:SINKS], *token_ids[start - NUM_CELLS + SINKS : start]])
        losses.append(nll(session.logits(chunk), chunk))
    return float(torch.cat(losses).mean())


def drop(cache: SessionCache, end: int) -> None:
    """Keep nothing of what is before `end`, the first tokens apart."""
    empty = [
        Slots.exact(*(held[:, :0] for held in layer.exact_entries(layer.start, layer.start + 1)), start=0)
        for layer in cache.compactable
    ]
    cache.restore(cache.compacted([Segment(SINKS, end, 0)], empty, SINKS))


def rolling(memory: Memory, token_ids: list[int]) -> float:
    """The same with the first tokens and the last ones as they were read, at their own positions, and nothing else."""
    engine, losses = memory.engine, []
    cache, before = engine.new_cache(), torch.empty(0, 0)
    for start in range(0, len(token_ids), STEP):
        if cache.num_exact_tokens + STEP > NUM_CELLS:
            drop(cache, start - (NUM_CELLS - SINKS - STEP))
        chunk = token_ids[start : start + STEP]
        logits = engine.forward(cache, chunk, num_logits=len(chunk))
        if start >= len(token_ids) - NUM_JUDGED:
            losses.append(nll(torch.cat([before, logits[:-1]]), chunk))
        before = logits[-1:]
    return float(torch.cat(losses).mean())


def long(memory: Memory, num_tokens: int, schemes: list[str]) -> None:
    token_ids, rows = text_tokens(memory)[:num_tokens], []
    for name in schemes:
        options = SCHEMES[name]
        session = memory.session(name, policy=MemoryPolicy(**{**dict(LONG), **options}))
        started = time.perf_counter()
        loss = streamed(session, token_ids)
        seconds = time.perf_counter() - started
        layers = session._context.cache.state().layers
        compact = max(float(layer.slots.value.abs().max()) for layer in layers)
        exact = max(float(layer.buffer.value[:, :, : layer.length].abs().max()) for layer in layers)
        stats = session.stats
        rows.append(
            (name, f"{loss:.3f}", stats.num_compactions, f"{stats.kv_tokens:.0f}", f"{compact:.1f}", f"{exact:.1f}")
        )
        print(*rows[-1], f"{seconds:.0f} s", flush=True)
        memory.delete(name)
    for name, baseline in BASELINES.items():
        rows.append((name, f"{baseline(memory, token_ids):.3f}", 0, NUM_CELLS, "", ""))
        print(*rows[-1], flush=True)
    header = ("scheme", f"NLL of the last {NUM_JUDGED}", "compactions", "cells", "largest value, compact", "exact")
    print(table(header, rows))


BASELINES = {"window, as read": rolling, "window, read again at positions from 0": windowed}


def kl(model: str, ratio: float, names: list[str]) -> None:
    """Blocks of a text, compacted one by one but for their last tokens; then what follows is predicted."""
    policy = MemoryPolicy(
        trigger_tokens=1.0,
        pinned=SINKS,
        keep_ratio=1 / ratio,
        max_compact_tokens=4000,
        reference_queries=("repeat",),
        originals="drop",
    )
    folding = Memory(LlamaCppEngine(model, heads="shared"), policy)
    ragged = Memory(LlamaCppEngine(model), policy)
    token_ids, full = text_tokens(folding), folding.session("full")
    expected = {}
    for count in range(1, max(COUNTS) + 1):
        full.append(token_ids[(count - 1) * BLOCK : count * BLOCK])
        if count in COUNTS:
            expected[count] = full.logits(token_ids[count * BLOCK :][:NUM_AFTER])
    rows = []
    for name in names:
        memory, fit = (ragged if name == RAGGED else folding), KL_SCHEMES[name]
        session = memory.session(
            name, policy=policy.model_copy(update={"experiments": Experiments(fit=fit or "nothing")})
        )
        row: list[object] = [name]
        for count in range(1, max(COUNTS) + 1):
            session.append(token_ids[(count - 1) * BLOCK : count * BLOCK])
            cache = session._context.cache
            if fit is None:
                drop(cache, count * BLOCK - KEPT)
            else:
                size = cache.kv_tokens - SINKS
                session.compact((size - KEPT) / size)
            if count in COUNTS:
                logits = session.logits(token_ids[count * BLOCK :][:NUM_AFTER])
                row.append(f"{kl_divergence(expected[count], logits):.3f}")
        rows.append(row)
        print(*row, f"{session.stats.kv_tokens:.0f} cells", flush=True)
        memory.delete(name)
    print(table(("scheme", *(f"{count} compactions" for count in COUNTS)), rows))


def decode_rate(step: Callable[[], object], num_tokens: int) -> float:
    """Tokens a second, median of three."""
    rates = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(num_tokens):
            step()
        rates.append(num_tokens / (time.perf_counter() - started))
    return statistics.median(rates)


def stock_llama(model: str, num_cells: int) -> llama_cpp.Llama:
    threads = torch.get_num_threads()
    return llama_cpp.Llama(
        str(gguf_path(model)),
        n_ctx=num_cells + 256,
        flash_attn=True,
        verbose=False,
        n_threads=threads,
        n_threads_batch=threads,
    )


def speed(memory: Memory, model: str, num_tokens: int, decoded: int = 32) -> None:
    """Reading, decoding and compacting beside `llama_cpp.Llama`, with all tokens and with as many as are left."""
    token_ids, rows = text_tokens(memory)[:num_tokens], []
    stock = stock_llama(model, num_tokens)
    started = time.perf_counter()
    stock.eval(token_ids)
    reading = num_tokens / (time.perf_counter() - started)
    rows.append((f"reading {num_tokens:,} tokens: llama_cpp.Llama", f"{reading:.0f} tokens/s", "1.00x"))
    memory.engine.forward(memory.engine.new_cache(), token_ids[:64])  # warm
    session = memory.session("speed")
    started = time.perf_counter()
    session.append(token_ids)
    ours = num_tokens / (time.perf_counter() - started)
    rows.append(("ours", f"{ours:.0f} tokens/s", f"{ours / reading:.2f}x"))

    def decoding(name: str, session: Session, base: float) -> None:
        cache = session.fork()._context.cache
        rate = decode_rate(lambda: memory.engine.forward(cache, token_ids[:1], num_logits=1), decoded)
        rows.append((name, f"{rate:.1f} tokens/s", f"{rate / base:.2f}x"))

    whole = decode_rate(lambda: stock.eval([token_ids[0]]), decoded)
    rows.append((f"decoding behind {num_tokens:,} tokens: llama_cpp.Llama", f"{whole:.1f} tokens/s", "1.00x"))
    decoding("ours, nothing compacted", session, whole)
    warm = session.fork()
    warm.compact(0.1)  # query maps, and whatever else is measured or compiled once
    report = session.compact(1.0)
    cells = round(session.stats.kv_tokens)
    few = stock_llama(model, cells + 3 * decoded)
    few.eval(token_ids[:cells])
    base = decode_rate(lambda: few.eval([token_ids[0]]), decoded)
    rows.append((f"decoding behind {cells:,} tokens: llama_cpp.Llama", f"{base:.1f} tokens/s", "1.00x"))
    decoding(f"ours, {num_tokens:,} tokens in {cells:,} slots", session, base)
    decoding("the same, beside llama_cpp.Llama with all tokens", session, whole)
    for name, seconds in (
        ("compacting all of them", report.seconds),
        ("queries", report.query_seconds),
        ("scores", report.score_seconds),
        ("fits", report.fit_seconds),
    ):
        rows.append((name, f"{seconds:.3f} s", f"{seconds * reading / num_tokens:.2f}x the reading"))
    print(table(("what", "", ""), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["long", "kl", "speed"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", choices=get_args(Heads), default="ragged", help="for long and speed")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="of the text")
    parser.add_argument("--schemes", nargs="*", default=[], help="some of those that are compared")
    parser.add_argument("--ratio", type=float, default=5.0, help="of the compactions for KL")
    args = parser.parse_args()
    known = KL_SCHEMES if args.mode == "kl" else SCHEMES
    if unknown := set(args.schemes) - set(known):
        parser.error(f"--schemes {', '.join(sorted(unknown))}: {args.mode} has {', '.join(known)}")
    schemes = args.schemes or list(known)
    if args.mode == "kl":
        kl(args.model, args.ratio, schemes)
    else:
        memory = Memory(LlamaCppEngine(args.model, heads=args.heads), MemoryPolicy(trigger_tokens=1.0, pinned=SINKS))
        long(memory, args.tokens, schemes) if args.mode == "long" else speed(memory, args.model, args.tokens)
    print(f"\n{args.model}; {machine()}, llama-cpp-python {llama_cpp.__version__}")


if __name__ == "__main__":
    main()
