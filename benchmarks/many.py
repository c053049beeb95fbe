"""Several sessions at the same time: tokens per second together, over one session after the other.

    python benchmarks/many.py                            the demo model, 1, 4, 8 and 16 sessions
    python benchmarks/many.py --model MODEL --dtype bfloat16 --sessions 1 8
    python benchmarks/many.py --engine llama_cpp --sessions 1 4 8
    python benchmarks/many.py --threads 1 --cpu-time     on a machine that does other work as well
    python benchmarks/many.py --stock                    beside transformers' `generate_batch` with the whole context

Each session reads a text and compacts it. Together and alone are measured in turn, on forks of the same
sessions, and figures are medians of `--rounds`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from common import machine, table, write_json

from am_memory import Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.letters import prose
from am_memory.engines.names import DtypeName, EngineName
from am_memory.engines.transformers.loading import load_model

GREEDY = Sampling(temperature=0)


def new_sessions(memory: Memory, num_sessions: int, num_texts: int, num_tokens: int) -> list[Session]:
    """Sessions with all but their last tokens compacted; those beyond `num_texts` are forks of the others."""
    sessions = []
    for seed in range(min(num_sessions, num_texts)):
        session = memory.scratch()
        text = " ".join(prose(random.Random(seed), num_tokens // 5))
        session.append(memory.tokenize(text)[:num_tokens])
        session.compact(0.95)
        sessions.append(session)
    return [*sessions, *(sessions[index % num_texts].fork() for index in range(num_texts, num_sessions))]


def together(memory: Memory, sessions: Sequence[Session], num_tokens: int) -> int:
    """Generate in all of them at the same time; returns the number of tokens."""
    answers = [session.generate(num_tokens, GREEDY) for session in sessions]
    return sum(len(piece.token_ids) for _, piece in memory.generate_many(answers))


def one_by_one(sessions: Sequence[Session], num_tokens: int) -> int:
    """Generate in one after the other; returns the number of tokens."""
    return sum(len(piece.token_ids) for session in sessions for piece in session.generate(num_tokens, GREEDY))


def rate(
    sessions: Sequence[Session], generate: Callable[[Sequence[Session]], int], clock: Callable[[], float]
) -> float:
    """Tokens per second, on forks; a token that does not count comes first, as it copies what the forks share."""
    forks = [session.fork() for session in sessions]
    for fork in forks:
        list(fork.generate(1, GREEDY))
    started = clock()
    num_tokens = generate(forks)
    return num_tokens / (clock() - started)


def measure(
    memory: Memory, sessions: Sequence[Session], num_tokens: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median tokens per second of both, and of their ratio."""
    pairs = [
        (
            rate(sessions, lambda forks: together(memory, forks, num_tokens), clock),
            rate(sessions, lambda forks: one_by_one(forks, num_tokens), clock),
        )
        for _ in range(rounds + 1)
    ][1:]
    return {
        "sessions": len(sessions),
        "together": statistics.median(both for both, _ in pairs),
        "one_by_one": statistics.median(each for _, each in pairs),
        "ratio": statistics.median(both / each for both, each in pairs),
    }


def stock(model: str, dtype: str, texts: Sequence[Sequence[int]], num_tokens: int) -> float:
    """Tokens per second of transformers' continuous batching, which holds the whole context of each."""
    from transformers import GenerationConfig

    loaded, _ = load_model(model, device="cpu", dtype=getattr(torch, dtype))
    config = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    seconds = []
    for length in (1, num_tokens):  # the time of reading the prompts is taken away
        config.max_new_tokens = length
        started = time.perf_counter()
        outputs = loaded.generate_batch([list(text) for text in texts], generation_config=config)
        assert all(len(output.generated_tokens) == length for output in outputs.values())
        seconds.append(time.perf_counter() - started)
    return len(texts) * (num_tokens - 1) / (seconds[1] - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--dtype", choices=get_args(DtypeName), help="default: float32, or float16 of llama.cpp")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--context-tokens", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=4, help="different ones; other sessions are forks")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process instead of the clock's")
    parser.add_argument("--stock", action="store_true", help="also measure generate_batch of transformers")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    dtype = args.dtype or {"transformers": "float32", "llama_cpp": "float16"}[args.engine]
    policy = MemoryPolicy(trigger_tokens=1.0, keep_ratio=0.1, recall_tokens=0)
    memory = Memory.from_pretrained(args.model, engine=args.engine, device="cpu", dtype=dtype, policy=policy)
    sessions = new_sessions(memory, max(args.sessions), args.texts, args.context_tokens)
    print(f"{memory.engine.info.name}, {args.engine}, {dtype}, {machine()}")
    print(f"{args.context_tokens:,} tokens of context in {sessions[0].stats.kv_tokens:,.0f} slots\n")
    rows = [measure(memory, sessions[:size], args.new_tokens, args.rounds, clock) for size in args.sessions]
    if args.stock:
        for row, size in zip(rows, args.sessions, strict=True):
            texts = [session.tokens for session in sessions[:size]]
            row["stock"] = stock(args.model, dtype, texts, args.new_tokens)
    header = ["sessions", "together, tokens/s", "one by one", "ratio", *(["generate_batch"] if args.stock else [])]
    print(table(header, [[row["sessions"], *(f"{value:.1f}" for value in list(row.values())[1:])] for row in rows]))
    write_json(args.json, rows)


if __name__ == "__main__":
    main()
