"""The memory as a drop-in, on prose: how near it stays to the full cache, beside a sliding window of the same size.

    python benchmarks/prose.py --model MODEL --text BOOK.txt

A text of 8,000 tokens is read with a trigger of 1,024; over its last 2,000 the KL from the full cache is taken at every
token. Schemes are policies as JSON, {} is the default one. The window holds the first tokens and as many of the last
ones as the trigger allows, with keys and values as they were read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import kl_divergence, machine, table, write_json
from torch import Tensor
from transformers import DynamicCache

from am_memory import Memory, MemoryPolicy, Session
from am_memory.cli.questions import PLAIN
from am_memory.engines.transformers import TransformersEngine

PIECE = 32
"""Tokens predicted before they are read: a compaction falls between two pieces, or is a few tokens late."""
SINKS = 4
Reader = Callable[[Sequence[int], bool], Tensor | None]
"""Reads some tokens, and gives what it expected at each of them where that is wanted."""


def remembering(session: Session) -> Reader:
    def read(token_ids: Sequence[int], is_judged: bool) -> Tensor | None:
        expected = session.logits(token_ids) if is_judged else None
        session.append(token_ids)
        return expected

    return read


def sliding(engine: TransformersEngine, window: int) -> Reader:
    """Full attention behind a mask, which is what a window's cache comes to."""
    cache, last = DynamicCache(), torch.empty(0)

    def read(token_ids: Sequence[int], is_judged: bool) -> Tensor | None:
        nonlocal last
        done = cache.get_seq_length()
        query = torch.arange(done, done + len(token_ids))[:, None]
        key = torch.arange(done + len(token_ids))
        is_seen = (key <= query) & ((key < SINKS) | (key > query - (window - SINKS)))
        mask = torch.zeros(is_seen.shape).masked_fill_(~is_seen, torch.finfo(torch.float32).min)
        with torch.no_grad():
            output = engine.model(input_ids=torch.tensor([token_ids]), attention_mask=mask[None, None], cache=cache)
        logits = output.logits[0, :, : engine.info.vocab_size].float()
        expected, last = torch.cat([last, logits[:-1]]) if len(last) else None, logits[-1:]
        return expected if is_judged else None

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", required=True, help="a file of prose, UTF-8")
    parser.add_argument("--skip-chars", type=int, default=0, help="of the text, at its beginning")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--judged", type=int, default=2000, help="the last ones")
    parser.add_argument("--trigger", type=int, default=1024)
    parser.add_argument("--policies", nargs="*", default=["{}"], help="as JSON")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=PLAIN)
    assert isinstance(memory.engine, TransformersEngine)
    token_ids = memory.tokenize(Path(args.text).read_text(encoding="utf-8")[args.skip_chars :])[: args.tokens]
    if len(token_ids) < args.tokens:
        parser.error(f"--tokens {args.tokens}: the text has {len(token_ids)}")
    sessions = {
        name: memory.scratch(policy=MemoryPolicy(**{"trigger_tokens": args.trigger, **json.loads(name)}))
        for name in args.policies
    }
    readers = {name: remembering(session) for name, session in sessions.items()}
    readers["window"] = sliding(memory.engine, args.trigger)
    full, start = remembering(memory.scratch()), args.tokens - args.judged
    full(token_ids[:start], False)
    for name, read in readers.items():
        for begin in range(0, start, memory.engine.chunk_tokens):
            read(token_ids[begin : min(begin + memory.engine.chunk_tokens, start)], False)
        print(f"{name} has read {start} tokens", flush=True)
    kl: dict[str, list[float]] = {name: [] for name in readers}
    sizes: dict[str, list[float]] = {name: [] for name in sessions}
    for begin in range(start, args.tokens, PIECE):
        piece = token_ids[begin : begin + PIECE]
        expected = full(piece, True)
        assert expected is not None
        for name, read in readers.items():
            got = read(piece, True)
            assert got is not None
            kl[name].append(kl_divergence(expected, got) * len(piece) / args.judged)
        for name, session in sessions.items():
            sizes[name].append(session.stats.kv_tokens)
    rows = [
        {
            "scheme": name,
            "kl": sum(pieces),
            "kv_tokens": sum(sizes[name]) / len(sizes[name]) if name in sizes else args.trigger,
            "compactions": sessions[name].stats.num_compactions if name in sessions else 0,
        }
        for name, pieces in kl.items()
    ]
    write_json(args.out, rows)
    lines = [(row["scheme"], f"{row['kl']:.4f}", f"{row['kv_tokens']:.0f}", row["compactions"]) for row in rows]
    print(table(("scheme", "KL", "cache, tokens (mean)", "compactions"), lines))
    print(f"\n{args.model}, {args.text}, trigger {args.trigger}; {machine()}")


if __name__ == "__main__":
    main()
