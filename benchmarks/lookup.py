"""The time of a turn with recall beside one without, for histories of any length.

    python benchmarks/lookup.py --model MODEL --tokens 4000 16000 64000 256000 1000000

A short chat is really read and compacted. Then its compacted part is stretched to the length of each history: segments
and originals in between get random entries of the model's shapes. A turn is a question of about 20 tokens, or as many
as --question-tokens, and an answer of --new-tokens. The time of the search is without that of its pages. Seconds are
those of the processor, all threads together, since others may use the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from common import machine, table

from am_memory import Memory, MemoryPolicy, Sampling, Segment, Session
from am_memory.kv_cache.cache import CacheState
from am_memory.kv_cache.layers import TailState
from am_memory.recall import search_index
from am_memory.recall.originals import KeysAndValues, Original, keys_of
from am_memory.recall.search_heads import search_heads
from am_memory.session import lookup

ORIGINAL_TOKENS = 256
QUESTIONS = [
    "Where did the heron stand in the evening?",
    "What was painted over the door of the cabin?",
    "How many tins were left on the shelf by the window?",
]


@dataclass(frozen=True, eq=False)
class RandomEntries:
    """Entries that are made up whenever they are read: a million tokens of a real model fill no memory."""

    like: list[KeysAndValues]
    num_tokens: int
    place: Any = "host"
    nbytes: int = 0
    digest: str = ""

    def layers(self) -> list[KeysAndValues]:
        def random(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape[0], self.num_tokens, tensor.shape[2]).to(tensor.dtype)

        return [(random(key), random(value)) for key, value in self.like]

    def keys(self, heads: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        return keys_of(self.layers(), heads)

    def packed(self) -> bytes:
        return b""


def stretched(session: Session, num_tokens: int) -> Session:
    """A branch whose compacted part is so long that the whole has `num_tokens` tokens."""
    branch = session.fork()
    context, cache = branch._context, branch._context.cache
    extra = num_tokens - len(context.tokens)
    if extra <= 0:
        return branch
    state, first = cache.state(), cache.segments[-1].end
    layers = [
        layer._replace(start=layer.start + extra) if isinstance(layer, TailState) else layer for layer in state.layers
    ]
    filler = tuple(Segment(first + start, first + min(start + 2048, extra), 0) for start in range(0, extra, 2048))
    cache.restore(CacheState(tuple(layers), (*state.segments, *filler), state.num_pinned_slots))
    like = [layer.exact_entries(cache.tail_start, cache.tail_start + 1) for layer in cache.compactable]
    made = []
    found = search_heads(branch.engine)
    for start in range(first, first + extra, ORIGINAL_TOKENS):
        end = min(start + ORIGINAL_TOKENS, first + extra)
        original = Original(start, end, RandomEntries(like, end - start))
        search_index._keys[original] = [
            torch.randn(end - start, like[layer][0].shape[2]).to(like[layer][0].dtype) for layer, _ in found.kv_heads
        ]
        made.append(original)
    context.originals = (*context.originals, *made)
    context.tokens[first:first] = [context.tokens[-1]] * extra
    context.records = [replace(record, recalls=()) for record in context.records]
    return branch


def turn_seconds(session: Session, question: str, new_tokens: int) -> tuple[float, float]:
    """The time of a turn, and that of its lookup."""
    branch, spent = session.fork(), []
    look = lookup.span_scores

    def timed(*args: Any) -> torch.Tensor:
        started = time.process_time()
        try:
            return look(*args)
        finally:
            spent.append(time.process_time() - started)

    lookup.span_scores = timed
    try:
        started = time.process_time()
        branch.append([{"role": "user", "content": question}])
        for _ in branch.generate(new_tokens, Sampling(temperature=0.0)):
            pass
        return time.process_time() - started, sum(spent)
    finally:
        lookup.span_scores = look


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_000, 16_000, 64_000, 256_000, 1_000_000])
    parser.add_argument("--trigger", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--question-tokens", type=int, default=0, help="repeat the question up to this length")
    parser.add_argument("--turns", type=int, default=9, help="of each kind; the median counts")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=MemoryPolicy(trigger_tokens=args.trigger))
    session = memory.scratch()
    session.append([{"role": "user", "content": "We sat by the river and the heron stood in the reeds. " * 120}])
    session.append([{"role": "assistant", "content": "That must have been a quiet evening."}])
    search_heads(memory.engine)
    rows = []
    for num_tokens in args.tokens:
        long = stretched(session, num_tokens)
        plain = long.fork(policy=long.policy.with_changes(recall_tokens=0))
        turn_seconds(long, QUESTIONS[0], 4)  # joins the keys of the whole history, once
        pairs = []
        for number in range(args.turns):
            question = QUESTIONS[number % len(QUESTIONS)]
            question += f" {question}" * (args.question_tokens // len(memory.tokenize(question)) - 1)
            recalled, spent = turn_seconds(long, question, args.new_tokens)
            pairs.append((recalled, turn_seconds(plain, question, args.new_tokens)[0], spent))
        ratio = statistics.median(one / other for one, other, _ in pairs)
        with_recall, without, search = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append((f"{num_tokens:,}", f"{with_recall:.2f}", f"{without:.2f}", f"{ratio:.2f}", f"{search:.3f}"))
        print(rows[-1], flush=True)
    print(f"\n{args.model}, {args.new_tokens} new tokens, trigger {args.trigger}; {machine()}\n")
    print(table(("tokens of history", "turn with recall, s", "without, s", "ratio", "search, s"), rows))


if __name__ == "__main__":
    main()
