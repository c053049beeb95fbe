"""A long chat: seconds of each turn, and memory of the process after it.

    python benchmarks/chat.py --model MODEL

A turn is a short message of the user and up to 24 generated tokens. Compactions fall into some turns and not into
others, so the figures are by block of 20 turns; growth is that of a straight line through the turns from 20 on.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import get_args

import psutil
from common import machine, table, write_json

from am_memory import Memory, MemoryPolicy, Sampling
from am_memory.cli.letters import prose
from am_memory.engines.names import EngineName

BLOCK = 20


@dataclass(frozen=True)
class Turn:
    """One turn, and how things stand after it."""

    seconds: float
    rss_mib: float
    kv_mib: float
    kv_tokens: float
    logical_tokens: int
    compactions: int


def talk(memory: Memory, num_turns: int, new_tokens: int) -> list[Turn]:
    session, rng, process = memory.session("chat"), random.Random(0), psutil.Process(os.getpid())
    turns = []
    for number in range(1, num_turns + 1):
        message = {"role": "user", "content": prose(rng, 1)[0]}
        started = time.perf_counter()
        session.append([message])
        for _ in session.generate(new_tokens, Sampling(temperature=0.8, top_p=0.95, seed=number)):
            pass
        seconds = time.perf_counter() - started
        stats = session.stats
        turns.append(
            Turn(
                seconds,
                process.memory_info().rss / 2**20,
                stats.kv_bytes / 2**20,
                stats.kv_tokens,
                stats.logical_tokens,
                stats.num_compactions,
            )
        )
        if number % BLOCK == 0:
            print(*row(turns, number - BLOCK), sep="  ", flush=True)
    return turns


def row(turns: list[Turn], start: int) -> tuple[object, ...]:
    """The turns from `start` on, as many as a block has: medians, and how things stand at its end."""
    block = turns[start : start + BLOCK]
    last = block[-1]
    return (
        f"{start + 1}-{start + len(block)}",
        f"{statistics.median(turn.seconds for turn in block):.2f}",
        f"{statistics.mean(turn.seconds for turn in block):.2f}",
        f"{last.rss_mib:,.0f}",
        f"{max(turn.kv_mib for turn in block):.1f}",
        f"{max(turn.kv_tokens for turn in block):,.0f}",
        f"{last.logical_tokens:,}",
        last.compactions,
    )


HEADER = ("turns", "s / turn, median", "mean", "RSS, MiB", "cache, MiB", "cache, tokens", "conversation", "compactions")


def growth(turns: list[Turn], what: str) -> float:
    """Rise of a straight line through the turns from the second block on, as a share of their mean."""
    values = [getattr(turn, what) for turn in turns[BLOCK:]]
    slope, _ = statistics.linear_regression(range(len(values)), values)
    return slope * len(values) / statistics.mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--trigger-tokens", type=int, default=512)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    if args.turns < 2 * BLOCK:
        parser.error(f"--turns {args.turns}: growth is measured from turn {BLOCK} on, so give {2 * BLOCK} or more")
    policy = MemoryPolicy(trigger_tokens=args.trigger_tokens)
    turns = talk(Memory.from_pretrained(args.model, engine=args.engine, policy=policy), args.turns, args.new_tokens)
    write_json(args.out, [asdict(turn) for turn in turns])
    print(f"\n{args.model}, {args.engine}, {machine()}\n")
    print(table(HEADER, [row(turns, start) for start in range(0, len(turns), BLOCK)]))
    for what, name in (("seconds", "time of a turn"), ("rss_mib", "memory of the process")):
        print(f"from turn {BLOCK} to {len(turns)}, {name}: {growth(turns, what):+.1%}")


if __name__ == "__main__":
    main()
