"""Whether the error on queries that were held out of a fit predicts what the compaction costs.

    python benchmarks/gate.py --model MODEL --seeds 4

Blocks of codes hidden in prose are compacted at several ratios, each from the same exact cache. For each compaction:
the error on the fitted queries, that on the held-out ones (`CompactionReport.held_out_error`), and KL(full ||
compacted) on the codes, asked for, and on an unrelated continuation. Shown are Spearman's rank correlations over all
compactions, and within each ratio, where the ratio cannot be what both follow from.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from common import kl_divergence, machine, mean_spread, table, write_json
from recall import CONTINUATION, ask

from am_memory import Memory, MemoryPolicy
from am_memory.cli.letters import facts, hide, prose

POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", max_compact_tokens=2000, originals="drop")
ANY_ERROR = 1e9
"""A `max_error` that no compaction exceeds: the error is measured, and nothing follows from it."""


@dataclass(frozen=True)
class Result:
    """One compaction of one block."""

    seed: int
    block_tokens: int
    ratio: float
    fitted_error: float
    held_out_error: float
    kl_answer: float
    kl_continuation: float


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def measure(memory: Memory, seed: int, num_facts: int, ratios: Sequence[float]) -> list[Result]:
    rng = random.Random(seed)
    told = facts(rng, num_facts)
    full = memory.session()
    text = "Read this report. " + hide(rng, told, 3 * num_facts)
    full.append([{"role": "user", "content": text}, {"role": "assistant", "content": "I have read it."}])
    block_tokens = full.stats.logical_tokens
    recent = [{"role": "user", "content": " ".join(prose(rng, 6))}, {"role": "assistant", "content": "I see."}]
    full.append(recent)
    fraction = (block_tokens - 4) / (full.stats.logical_tokens - 1 - 4)
    answers = {fact: ask(full, fact)[1] for fact in told}
    continuation = full.logits(CONTINUATION)
    results = []
    for ratio in ratios:
        session = full.fork(policy=POLICY.model_copy(update={"keep_ratio": 1 / ratio, "max_error": ANY_ERROR}))
        report = session.compact(fraction)
        assert report.held_out_error is not None
        kl_answer = statistics.mean(kl_divergence(answers[fact], ask(session, fact)[1]) for fact in told)
        kl_continuation = kl_divergence(continuation, session.logits(CONTINUATION))
        results.append(
            Result(seed, block_tokens, ratio, report.output_error, report.held_out_error, kl_answer, kl_continuation)
        )
        print(results[-1], flush=True)
    memory.delete(full.name)
    return results


def correlations(results: Sequence[Result], of: Callable[[Result], float]) -> list[str]:
    """Rank correlations of an error with both KLs: over all results, and the mean of those within one ratio."""
    cells = []
    for kl in (lambda result: result.kl_answer, lambda result: result.kl_continuation):
        cells.append(f"{rank_correlation([*map(of, results)], [*map(kl, results)]):.2f}")
        groups = [[result for result in results if result.ratio == ratio] for ratio in {r.ratio for r in results}]
        within = [rank_correlation([*map(of, group)], [*map(kl, group)]) for group in groups]
        cells.append(f"{statistics.mean(within):.2f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--facts", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=POLICY)
    results: list[Result] = []
    for seed in range(args.seeds):
        for num_facts in args.facts:
            results += measure(memory, seed, num_facts, args.ratios)
            write_json(args.out, [asdict(result) for result in results])
    rows = []
    for ratio in args.ratios:
        group = [result for result in results if result.ratio == ratio]
        columns = ("fitted_error", "held_out_error", "kl_answer", "kl_continuation")
        rows.append((f"{ratio:g}x", *(mean_spread(getattr(result, name) for result in group) for name in columns)))
    header = ("ratio", "error, fitted", "error, held out", "KL answer", "KL continuation")
    print(f"\n{args.model}, {len(results)} compactions; {machine()}\n\n{table(header, rows)}\n")
    rows = [
        ("held out", *correlations(results, lambda result: result.held_out_error)),
        ("fitted", *correlations(results, lambda result: result.fitted_error)),
    ]
    header = ("rank correlation of the error", "KL answer", "at one ratio", "KL continuation", "at one ratio")
    print(table(header, rows))


if __name__ == "__main__":
    main()
