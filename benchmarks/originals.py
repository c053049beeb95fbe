"""The use of originals: search for codes that a compaction lost, recall their segments, and ask again.

    python benchmarks/originals.py --model MODEL --seeds 3

Codes hidden in prose are told over several turns, each compacted hard. For each code that is compacted by then, the
question is searched for, by originals and by what is left in slots (`originals="drop"`). Then, on a branch, the best
spans are recalled, and the code is asked for. Recalled means: greedy decoding gives the code, digit for digit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from common import machine, table, write_json
from recall import ask

from am_memory import Memory, MemoryPolicy, Session
from am_memory.cli.letters import Fact, facts, hide
from am_memory.recall.search import Span

POLICY = MemoryPolicy(trigger_tokens=0.25, pinned="sinks", keep_recent=16, max_compact_tokens=200, originals="host")
TURNS, FACTS_EACH = 4, 3


@dataclass(frozen=True)
class Result:
    """One code; ranks are those of the first span that holds it, 1 the best; None: in none of the first 10."""

    seed: int
    rank_by_originals: int | None
    rank_by_slots: int | None
    in_full: bool
    compacted: bool
    after_recall: bool
    search_seconds: float
    recall_seconds: float


def rank(spans: Sequence[Span], fact: Fact) -> int | None:
    return next((place for place, span in enumerate(spans, 1) if fact.code in span.text), None)


def told(memory: Memory, seed: int, policy: MemoryPolicy, *, is_compacted: bool) -> tuple[Session, list[Fact]]:
    rng = random.Random(seed)
    all_facts = facts(rng, TURNS * FACTS_EACH)
    session = memory.session(policy=policy)
    for turn in range(TURNS):
        text = "Read this report. " + hide(rng, all_facts[FACTS_EACH * turn :][:FACTS_EACH], 12)
        session.append([{"role": "user", "content": text}, {"role": "assistant", "content": "I have read it."}])
        if is_compacted:
            session.compact(1.0)
    return session, all_facts


def measure(memory: Memory, seed: int, ratio: float, top: int) -> list[Result]:
    policy = POLICY.model_copy(update={"keep_ratio": 1 / ratio})
    full, _ = told(memory, seed, policy, is_compacted=False)
    session, all_facts = told(memory, seed, policy, is_compacted=True)
    dropped, _ = told(memory, seed, policy.model_copy(update={"originals": "drop"}), is_compacted=True)
    results = []
    for fact in all_facts:
        started = time.perf_counter()
        spans = session.search(fact.question, top=10)
        searched = time.perf_counter()
        branch = session.fork()
        for span in reversed(spans[:top]):
            branch.recall(span)
        seconds = time.perf_counter() - searched
        results.append(
            Result(
                seed,
                rank(spans, fact),
                rank(dropped.search(fact.question, top=10), fact),
                ask(full, fact)[0],
                ask(session, fact)[0],
                ask(branch, fact)[0],
                searched - started,
                seconds,
            )
        )
        print(results[-1], flush=True)
    for each in (full, session, dropped):
        memory.delete(each.name)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=20)
    parser.add_argument("--top", type=int, default=1, help="recall so many of the spans found")
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=POLICY)
    results: list[Result] = []
    for seed in range(args.seeds):
        results += measure(memory, seed, args.ratio, args.top)
        write_json(args.out, [asdict(result) for result in results])
    rows: list[tuple[object, ...]] = []
    for name, ranks in (
        ("originals", [result.rank_by_originals for result in results]),
        ("slots", [result.rank_by_slots for result in results]),
    ):
        within = [sum(place is not None and place <= limit for place in ranks) for limit in (1, 3, 5)]
        rows.append((name, *(f"{count} of {len(ranks)}" for count in within)))
    print(f"\n{args.model}, {args.ratio:g}x, {args.seeds} seeds; {machine()}\n")
    print(table(("searched in", "found first", "among the first 3", "among the first 5"), rows))
    counts = [
        ("full cache", sum(result.in_full for result in results)),
        (f"compacted {args.ratio:g}x", sum(result.compacted for result in results)),
        (f"the same, {args.top} found and recalled", sum(result.after_recall for result in results)),
    ]
    print("\n" + table(("cache", "codes recalled"), [(name, f"{count} of {len(results)}") for name, count in counts]))
    seconds = [
        statistics.median(getattr(result, f"{what}_seconds") for result in results) for what in ("search", "recall")
    ]
    print(f"\nmedian seconds: search {seconds[0]:.2f}, recall {seconds[1]:.3f}")


if __name__ == "__main__":
    main()
