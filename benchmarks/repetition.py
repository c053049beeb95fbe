"""The cost of repetition: one text, one final budget, compacted in 1 to 50 steps, oldest first.

    python benchmarks/repetition.py --model MODEL --compactions 1 2 5 10 25 50
    python benchmarks/repetition.py --engine llama_cpp --model MODEL.gguf --schemes ours

Codes lie all over a text of some 6,000 tokens. It is read in 50 pieces; with n compactions everything read so far, but
for the last --recent tokens, is compacted after each 50/n of them, so that in the end every scheme holds as much,
whatever n is. (There is one compaction less where the first part is not longer than these tokens.) Then all codes are
asked for, and an unrelated continuation is read. Recalled and KL are those of recall.py.

Schemes: ours, with slots alone, and with at most 256 tokens recalled for each question; everything compacted again
each time ("refit"); eviction by the queries of the last 32 tokens, the same number of slots for every head (as SnapKV);
eviction by the largest attention while the text is repeated, slots shared by all heads (as KVzip); the first tokens and
a window of the last ones; a summary by the model itself, in as many tokens, of the last summary and what came since.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import get_args

import torch
from common import drawing, machine, mean_of, read_json, table, write_json
from recall import CONTINUATION, POLICY, Judge, Result, report
from torch import Tensor

from am_memory import Experiments, Memory, Session
from am_memory.cli.letters import Fact, facts, hide
from am_memory.engines.base import Message
from am_memory.engines.names import EngineName
from am_memory.solver import Block
from am_memory.solver.exact import unnormalised_weights
from am_memory.solver.keys import repeat_first_in_padding
from am_memory.text.sampling import Sampling

OBSERVED_TOKENS = 32
SINKS = 4
READ = "I have read it."
GREEDY = Sampling(temperature=0.0)
Scheme = Callable[[Session, Memory, "Text", int, "Size"], Session]
"""From the full session, the memory, the text, the number of compactions and the size to come to."""
SUMMARY_REQUEST = (
    "Sum up everything that you have read so far, with every name and every number, as briefly as you can."
)


@dataclass(frozen=True)
class LargestAttention:
    """The keys that some query looks at hardest, whatever the others do."""

    name: str = "largest_attention"

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        largest = torch.zeros_like(scores)
        for _, weight, total, _ in unnormalised_weights(block):
            torch.maximum(largest, (weight / total[:, :, None]).amax(1), out=largest)
        ranking = largest.sort(dim=1, descending=True, stable=True).indices
        return repeat_first_in_padding(ranking[:, : int(num_slots.max())], num_slots)


EVICTION = Experiments(fit="nothing")
SNAPKV: dict[str, object] = {"experiments": EVICTION, "head_budget": "uniform", "reference_queries": ("live",)}
KVZIP: dict[str, object] = {
    "experiments": EVICTION,
    "key_selection": LargestAttention(),
    "reference_queries": ("repeat",),
}


@dataclass(frozen=True)
class Size:
    """One slot for `ratio` tokens, and the last tokens exact."""

    ratio: float
    recent_tokens: int

    def tokens(self, full: Session) -> int:
        """The tokens in the cache after the whole text."""
        return int((len(full.tokens) - self.recent_tokens) / self.ratio) + self.recent_tokens


@dataclass(frozen=True)
class Text:
    """Pieces of one report, with the codes told in each fifth of it."""

    pieces: tuple[str, ...]
    told: list[list[Fact]]


def write_text(seed: int, num_facts: int, num_pieces: int, sentences: int) -> Text:
    rng = random.Random(5000 + seed)
    told = facts(rng, num_facts)
    places = sorted(rng.choices(range(num_pieces), k=num_facts))
    here = [[fact for fact, place in zip(told, places, strict=True) if place == number] for number in range(num_pieces)]
    pieces = tuple(hide(rng, some, max(sentences, len(some))) for some in here)
    fifth = num_pieces / 5
    by_fifth = [[f for f, place in zip(told, places, strict=True) if int(place / fifth) == n] for n in range(5)]
    return Text(pieces, by_fifth)


def parts_of(text: Text, count: int) -> list[list[Message]]:
    """The text as turns, one for each piece, in `count` parts of as many each."""
    turns = [
        [{"role": "user", "content": f"Read on. {piece}"}, {"role": "assistant", "content": READ}]
        for piece in text.pieces
    ]
    size = len(turns) // count
    return [list(chain.from_iterable(turns[start : start + size])) for start in range(0, len(turns), size)]


def compact_but_last(session: Session, num_tokens: int) -> None:
    """Compact everything but the first tokens, which are pinned, and the last ones."""
    available = session.stats.kv_tokens - SINKS
    session.compact((available - num_tokens) / available)


def compacting(**options: object) -> Scheme:
    """Everything read so far is compacted after each part, but for what is recent or it is observed with."""

    def run(full: Session, memory: Memory, text: Text, count: int, size: Size) -> Session:
        policy = POLICY.model_copy(update={"keep_ratio": 1 / size.ratio, **options})
        session = memory.scratch(policy=policy)
        spared = max(size.recent_tokens, OBSERVED_TOKENS if policy.reference_queries == ("live",) else 0)
        for part in parts_of(text, count):
            session.append(part)
            if session.stats.exact_tokens - SINKS - spared >= size.ratio:
                compact_but_last(session, spared)
        return session

    return run


def window(full: Session, memory: Memory, text: Text, count: int, size: Size) -> Session:
    """The first tokens and the last ones, as many as the other schemes hold, read again into an empty cache."""
    session = memory.scratch()
    session.append([*full.tokens[:SINKS], *full.tokens[-size.tokens(full) :]])
    return session


def summarised(full: Session, memory: Memory, text: Text, count: int, size: Size) -> Session:
    """A summary of the last summary and the next part, again and again; all that the others hold may be summary."""
    limit, summary = size.tokens(full), ""
    for part in parts_of(text, count):
        session = memory.scratch()
        before = [{"role": "user", "content": summary}, {"role": "assistant", "content": READ}] if summary else []
        session.append([*before, *part, {"role": "user", "content": SUMMARY_REQUEST}])
        summary = "".join(piece.text for piece in session.generate(limit, GREEDY))
    session = memory.scratch()
    session.append([{"role": "user", "content": summary}, {"role": "assistant", "content": READ}])
    return session


SCHEMES: dict[str, Scheme] = {
    "ours": compacting(),
    "ours, recalling": compacting(originals="host", recall_tokens=256),
    "recompact everything": compacting(experiments=Experiments(recompaction="refit")),
    "eviction, observed (SnapKV style)": compacting(**SNAPKV),
    "eviction, repeated (KVzip style)": compacting(**KVZIP),
    "window": window,
    "summary": summarised,
}
REPEATS = {"window": (1,)}
"""Schemes that do not depend on the number of compactions."""


def run(memory: Memory, seed: int, args: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Add what is not among the rows yet."""
    done = {(one["scheme"], one["compactions"]) for one in rows if one["seed"] == seed}
    text = write_text(seed, args.facts, args.pieces, args.sentences)
    full = memory.scratch()
    full.append(parts_of(text, 1)[0])
    judge = Judge(full, text.told, CONTINUATION)
    if ("full cache", 0) not in done:
        rows.append(row(0, judge.judge(full, "full cache", 1.0, seed, 0.0)))
    for scheme in args.schemes:
        for count in REPEATS.get(scheme, args.compactions):
            if (scheme, count) in done:
                continue
            started = time.perf_counter()
            session = SCHEMES[scheme](full, memory, text, count, Size(args.ratio, args.recent))
            seconds = time.perf_counter() - started
            rows.append(row(count, judge.judge(session, scheme, args.ratio, seed, seconds)))
            write_json(args.out, rows)


def row(count: int, result: Result) -> dict[str, object]:
    print(f"{count:3d} compactions  ", end="")
    report(result)
    return {"compactions": count, **asdict(result)}


def summary(rows: Sequence[dict[str, object]]) -> str:
    """A line for each scheme and number of compactions, means over seeds."""
    lines = []
    for scheme, count in dict.fromkeys((one["scheme"], one["compactions"]) for one in rows):
        group = [one for one in rows if (one["scheme"], one["compactions"]) == (scheme, count)]
        lines.append(
            (
                scheme,
                count or "",
                f"{mean_of(group, 'recalled'):.1f} of {group[0]['asked']}",
                f"{mean_of(group, 'kl_answer'):.3f}",
                f"{mean_of(group, 'kl_continuation'):.3f}",
                f"{mean_of(group, 'kv_tokens'):.0f}",
            )
        )
    return table(("scheme", "compactions", "recalled", "KL answer", "KL continuation", "cache, tokens"), lines)


def plot(rows: Sequence[dict[str, object]], path: str) -> None:
    """Recall by number of compactions."""
    with drawing(path, (9, 4)) as (axis,):
        for scheme in dict.fromkeys(str(one["scheme"]) for one in rows):
            group = [one for one in rows if one["scheme"] == scheme]
            counts = sorted({int(str(one["compactions"])) for one in group})
            shares = [
                [float(str(one["recalled"])) / float(str(one["asked"])) for one in group if one["compactions"] == count]
                for count in counts
            ]
            means = [sum(each) / len(each) for each in shares]
            if len(counts) == 1:
                style = {"full cache": "-", "window": ":"}.get(scheme, "--")
                axis.axhline(means[0], linestyle=style, linewidth=1, label=scheme, color="#888888")
            else:
                axis.plot(counts, means, marker="o", label=scheme, linewidth=2.5 if scheme == "ours" else 1.2)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 25, 50], ["1", "2", "5", "10", "25", "50"])
        axis.set_xlabel("compactions, to the same final size")
        axis.set_ylabel("codes recalled, of those told")
        axis.set_ylim(-0.03, 1.05)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--compactions", type=int, nargs="+", default=[1, 2, 5, 10, 25, 50])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--ratio", type=float, default=10.0)
    parser.add_argument("--recent", type=int, default=128, help="the last tokens, which stay exact")
    parser.add_argument("--facts", type=int, default=24)
    parser.add_argument("--pieces", type=int, default=50)
    parser.add_argument("--sentences", type=int, default=6, help="of prose in each piece")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", help="write the figures as JSON; what is in it already is not run again")
    parser.add_argument("--plot", help="draw recall by number of compactions to this file")
    args = parser.parse_args()
    for count in args.compactions:
        if count < 1 or args.pieces % count:
            parser.error(f"--compactions {count}: {args.pieces} pieces cannot be cut in as many equal parts")
    memory = Memory.from_pretrained(args.model, engine=args.engine, policy=POLICY)
    rows: list[dict[str, object]] = read_json(args.out)
    for seed in range(args.seeds):
        run(memory, seed, args, rows)
    order = ["full cache", *SCHEMES]
    rows.sort(key=lambda one: (one["seed"], order.index(one["scheme"]), one["compactions"]))
    write_json(args.out, rows)
    if args.plot:
        plot(rows, args.plot)
    print(f"\n{args.model}, {args.engine}, {args.ratio:.0f}x, {args.seeds} seeds; {machine()}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()
