"""The solver against a straightforward per-head implementation, on the same tensors, in one run.

    python benchmarks/solver.py                       # a table on standard output
    python benchmarks/solver.py --omp --out solver.json

The baseline follows the official code step by step, in float32, one head at a time: softmax scores and top-k; the bias
by `lstsq` and a clamp to the bounds; the values by `lstsq`, which attends to the block a second time; OMP with `lstsq`
from scratch after each pick. "baseline, shared" computes the attention weights once: a stricter baseline.

Errors are measured in float64, on the queries of the fit and on held-out queries of the same kind.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from am_memory.solver import OMP, Block, FitOptions, HighestAttention, KeySelection, exact_attention, fit, naive

SIZES = {"748/149": (748, 149, 5355), "2048/410": (2048, 410, 8192)}  # keys, slots, queries
HEAD_DIM = 64
BOUNDS = (-3.0, 3.0)
OMP_BOUNDS = (-7.0, 7.0)  # the paper's too

Compacted = tuple[Tensor, Tensor, Tensor]  # key (B, t, d), bias (B, t), value (B, t, d)
Solve = Callable[[Block, int], Compacted]


@dataclass(frozen=True)
class Row:
    size: str
    method: str
    num_heads: int
    seconds_per_head: float
    times_faster: float  # than the first baseline of the method
    mass_error: float
    output_error: float
    held_out_mass_error: float
    held_out_output_error: float


def synthetic_block(num_heads: int, seq_len: int, num_queries: int, seed: int) -> Block:
    """Heads that look like a language model's: recurring words, a sink, some heads peaked and some diffuse.

    Keys are low-rank plus noise around an offset; a query looks for one key, with a strength of its own, and a little
    for everything; the first key is a sink. The softmax puts between a third and half on one key in the mean.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank = 12
    spectrum = 1.5 * torch.arange(1, rank + 1).rsqrt()
    basis = torch.linalg.qr(normal(num_heads, HEAD_DIM, rank))[0].mT * HEAD_DIM**0.5
    word = torch.randint(seq_len // 4 + 1, (seq_len,), generator=generator)
    meaning = 0.7 * normal(num_heads, seq_len // 4 + 1, rank)[:, word] + 0.5 * normal(num_heads, seq_len, rank)
    content = 0.5 * (meaning * spectrum) @ basis + 0.3 * normal(num_heads, seq_len, HEAD_DIM)
    key = content + 2.0 * normal(num_heads, 1, HEAD_DIM)

    wanted = torch.randint(seq_len, (num_queries,), generator=generator)
    sharpness = torch.linspace(0.15, 1.1, num_heads)[:, None, None]
    strength = 1.6 * torch.rand(num_queries, 1, generator=generator) ** 1.5
    broad = 0.35 * (normal(num_heads, num_queries, rank) * spectrum) @ basis
    query = sharpness * strength * content[:, wanted] + broad + 0.3 * normal(num_heads, num_queries, HEAD_DIM)
    sink = torch.nn.functional.normalize(normal(num_heads, 1, HEAD_DIM), dim=2)
    query = query + 3.0 * sink
    key[:, :1] += 3.0 * HEAD_DIM**0.5 * sink * (0.3 + 0.7 * torch.rand(num_heads, 1, 1, generator=generator))

    topics = 0.5 * normal(num_heads, 16, HEAD_DIM)
    topic = 0.5 * normal(num_heads, seq_len // 4 + 1, 16)[:, word] + 0.3 * normal(num_heads, seq_len, 16)
    value = topic @ topics + 0.2 * normal(num_heads, seq_len, HEAD_DIM)
    value[:, 0] *= 0.1
    return Block(query, key, value, HEAD_DIM**-0.5)


def ours(
    selection: KeySelection, is_relative: bool = True, ridge: float = 1e-2, bounds: tuple[float, float] = BOUNDS
) -> Solve:
    options = FitOptions(bias_bounds=bounds, ridge=ridge, relative_mass=is_relative)

    def solve(block: Block, num_slots: int) -> Compacted:
        slots = torch.full((block.num_heads,), num_slots)
        exact = exact_attention(block)
        indices = selection(block, exact.scores, slots)
        result = fit(block, indices, slots, options, exact=exact)
        return result.key, result.bias, result.value

    return solve


def per_head(solve_head: Callable[[Tensor, Tensor, Tensor, float, int], Compacted]) -> Solve:
    def solve(block: Block, num_slots: int) -> Compacted:
        heads = [
            solve_head(block.query[head], block.key[head], block.value[head], block.scaling, num_slots)
            for head in range(block.num_heads)
        ]
        key, bias, value = zip(*heads, strict=True)
        return torch.stack(key), torch.stack(bias), torch.stack(value)

    return solve


def baseline_highest(query: Tensor, key: Tensor, value: Tensor, scaling: float, num_slots: int) -> Compacted:
    numerator, total = softmax_parts(query, key, scaling)
    scores = (numerator / total).square().mean(0).sqrt()
    kept = scores.topk(num_slots).indices
    weight = torch.linalg.lstsq(numerator[:, kept], total).solution[:, 0]
    bias = weight.clamp(*torch.tensor(BOUNDS).exp().tolist()).log()
    return key[kept], bias, baseline_values(query, key, value, scaling, key[kept], bias)


def baseline_highest_shared(query: Tensor, key: Tensor, value: Tensor, scaling: float, num_slots: int) -> Compacted:
    numerator, total = softmax_parts(query, key, scaling)
    attention = numerator / total
    kept = attention.square().mean(0).sqrt().topk(num_slots).indices
    columns = numerator[:, kept]
    weight = torch.linalg.lstsq(columns, total).solution[:, 0].clamp(*torch.tensor(BOUNDS).exp().tolist())
    compact = columns * weight
    compact = compact / compact.sum(1, keepdim=True)
    fitted = torch.linalg.lstsq(compact, attention @ value, driver="gels").solution
    return key[kept], weight.log(), fitted


def baseline_omp(query: Tensor, key: Tensor, value: Tensor, scaling: float, num_slots: int) -> Compacted:
    numerator, total = softmax_parts(query, key, scaling)
    kept: list[int] = []
    residual, weight = total, total.new_empty(0)
    while len(kept) < num_slots:
        correlation = (numerator * residual).sum(0)
        correlation[kept] = -torch.inf
        kept.append(int(correlation.argmax()))
        weight = torch.linalg.lstsq(numerator[:, kept], total).solution.clamp_min(1e-12)
        residual = total - numerator[:, kept] @ weight
    bias = weight[:, 0].log()
    return key[kept], bias, baseline_values(query, key, value, scaling, key[kept], bias)


def softmax_parts(query: Tensor, key: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """exp(logit - largest) (n, T), and its row sums (n, 1)."""
    logits = query @ key.T * scaling
    numerator = torch.exp(logits - logits.amax(1, keepdim=True))
    return numerator, numerator.sum(1, keepdim=True)


def baseline_values(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, kept_key: Tensor, bias: Tensor
) -> Tensor:
    numerator, total = softmax_parts(query, key, scaling)
    compact = torch.softmax(query @ kept_key.T * scaling + bias, dim=1)
    return torch.linalg.lstsq(compact, (numerator / total) @ value, driver="gels").solution


def mean_errors(block: Block, compacted: Compacted) -> tuple[float, float]:
    """Mass and output error over the block's queries in float64, mean over heads."""
    errors = []
    for index, (key, bias, value) in enumerate(zip(*compacted, strict=True)):
        head = naive.Head.of(block, index)
        logits = head.Q @ key.double().T * block.scaling + bias
        errors.append(torch.stack(naive.errors(head, logits, value)))
    mass, output = torch.stack(errors).mean(0).tolist()
    return mass, output


def compare(
    size: str, contenders: dict[str, Solve], num_heads: int, repeats: int, clock: Callable[[], float]
) -> list[Row]:
    """Run the contenders in turn, `repeats` times, on one block; the first is the baseline of `times_faster`."""
    seq_len, num_slots, num_queries = SIZES[size]
    num_held_out = 1000
    whole = synthetic_block(num_heads, seq_len, num_queries + num_held_out, seed=0)
    block, held_out = (
        Block(query.contiguous(), whole.key, whole.value, whole.scaling)
        for query in whole.query.split((num_queries, num_held_out), dim=1)
    )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Compacted] = {}
    for _ in range(repeats):
        for name, solve in contenders.items():
            start = clock()
            results[name] = solve(block, num_slots)
            seconds[name].append((clock() - start) / num_heads)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    baseline = median[next(iter(contenders))]
    return [
        Row(
            size,
            name,
            num_heads,
            median[name],
            baseline / median[name],
            *mean_errors(block, compacted),
            *mean_errors(held_out, compacted),
        )
        for name, compacted in results.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    parser.add_argument("--heads", type=int, default=4, help="heads in a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--omp", action="store_true", help="also OMP (its baseline takes minutes at 2048/410)")
    parser.add_argument("--omp-heads", type=int, default=1)
    parser.add_argument("--omp-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU instead of wall time: for a busy machine, with --threads 1"
    )
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter

    highest = {
        "baseline": per_head(baseline_highest),
        "baseline, shared": per_head(baseline_highest_shared),
        "ours": ours(HighestAttention()),
        "ours, paper's weights, no ridge": ours(HighestAttention(), is_relative=False, ridge=0.0),
    }
    pursuit = {
        "OMP baseline": per_head(baseline_omp),
        "OMP ours": ours(OMP(), bounds=OMP_BOUNDS),
        "OMP ours, the baseline's picks": ours(OMP(relative_mass=False), ridge=1e-3, bounds=OMP_BOUNDS),
        "OMP ours, fast": ours(OMP.fast(), bounds=OMP_BOUNDS),
    }
    rows: list[Row] = []
    print(f"{'size':9} {'method':37} {'s/head':>8} {'faster':>7} {'mass':>7} {'output':>7}   held out: mass, output")
    for size in arguments.size or SIZES:
        runs = [(highest, arguments.heads, arguments.repeats)]
        if arguments.omp:
            runs.append((pursuit, arguments.omp_heads, arguments.omp_repeats))
        for contenders, num_heads, repeats in runs:
            for row in compare(size, contenders, num_heads, repeats, clock):
                rows.append(row)
                print(
                    f"{row.size:9} {row.method:37} {row.seconds_per_head:8.4f} {row.times_faster:6.1f}x "
                    f"{row.mass_error:7.4f} {row.output_error:7.4f}   {row.held_out_mass_error:14.4f} "
                    f"{row.held_out_output_error:7.4f}",
                    flush=True,
                )
    if arguments.out:
        machine = {"processor": platform.processor(), "threads": arguments.threads, "torch": torch.__version__}
        machine["clock"] = "cpu" if arguments.cpu_time else "wall"
        arguments.out.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
