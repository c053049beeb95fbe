"""Quality against size and against seconds, for each source of queries, way to choose keys, and budget.

    python benchmarks/pareto.py --model MODEL --out FILE.json --plot FILE.png

One compaction of a report with 12 codes, as in `recall.py once`, at 2x to 200x; each scheme changes one thing of the
default policy. On the front, at a ratio, is who has no other scheme that is both faster and nearer to the full cache.

    python benchmarks/pareto.py --model MODEL --ratios 10 --schemes default --cartridge-seconds 100 1000

trains a cache of the same size as well (`baselines/cartridge.py`), and judges it each time that it was trained so long.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from baselines.cartridge import trained
from common import drawing, machine, mean_of, read_json, table, write_json
from recall import POLICY, Scene, report, set_scene

from am_memory import Experiments, Memory, MemoryPolicy, Session

DEFAULT = "default"
SCHEMES: dict[str, dict[str, object]] = {
    DEFAULT: {},
    "queries: repeat": {"reference_queries": ("repeat",)},
    "queries: live": {"reference_queries": ("live",)},
    "queries: repeat and live": {"reference_queries": ("repeat", "live")},
    "on-policy": {"experiments": Experiments(on_policy=True)},
    "on-policy, budget: uniform": {"experiments": Experiments(on_policy=True), "head_budget": "uniform"},
    "queries: self-study": {"reference_queries": ("self_study",)},
    "queries: repeat and self-study": {"reference_queries": ("repeat", "self_study")},
    "keys: OMP": {"key_selection": "omp"},
    "keys: OMP, fast": {"key_selection": "omp_fast"},
    "budget: uniform": {"head_budget": "uniform"},
    "fit: nothing (eviction)": {"experiments": Experiments(fit="nothing")},
}
CARTRIDGE = "Cartridges style"
Row = dict[str, object]


def prepared(memory: Memory, scene: Scene, options: dict[str, object], ratio: float) -> Session:
    """A session that has read everything, and has seen the queries that its policy wants."""
    # A new policy, so that `key_selection` may be a name; a lower bound, so that 200x leaves every head a slot.
    policy = MemoryPolicy(**{**dict(POLICY), "max_compact_tokens": 2000, **options, "keep_ratio": 1 / ratio})
    if "live" not in (policy.reference_queries or ()):
        return scene.full.fork(policy=policy)
    session = memory.scratch(policy=policy)
    session.append(scene.full.tokens)
    return session


def run(memory: Memory, seed: int, args: argparse.Namespace, rows: list[Row]) -> None:
    """Add what is not among the rows yet."""
    done = {(row["scheme"], row["ratio"]) for row in rows if row["seed"] == seed}
    scene = set_scene(memory, seed)
    for scheme in args.schemes:
        for ratio in args.ratios:
            if (scheme, ratio) in done:
                continue
            session = prepared(memory, scene, SCHEMES[scheme], ratio)
            started = time.perf_counter()
            session.compact(scene.old_fraction)
            result = scene.judge.judge(session, scheme, ratio, seed, time.perf_counter() - started)
            report(result)
            rows.append(asdict(result))
            write_json(args.out, rows)
    ratio = nearest_to_ten(args.ratios)
    limits = [seconds for seconds in sorted(args.cartridge_seconds) if (cartridge_name(seconds), ratio) not in done]
    for row in train(memory, scene, seed, ratio, limits) if limits else ():
        rows.append(row)
        write_json(args.out, rows)
    memory.delete(scene.full.name)


def train(memory: Memory, scene: Scene, seed: int, ratio: float, limits: Sequence[float]) -> Iterator[Row]:
    """One trained cache, judged whenever it was trained for one of `limits`, in seconds."""
    session = prepared(memory, scene, {}, ratio)
    for limit, reached in zip(limits, trained(session, scene.old_fraction, limits), strict=True):
        result = scene.judge.judge(reached.session, cartridge_name(limit), ratio, seed, reached.seconds)
        report(result)
        print(
            f"  {reached.steps} steps, KL of the conversations {reached.kl_training}, "
            f"{reached.writing_seconds:.1f} s to write them",
            flush=True,
        )
        yield {
            **asdict(result),
            "writing_seconds": reached.writing_seconds,
            "steps": reached.steps,
            "kl_training": reached.kl_training,
        }


def cartridge_name(seconds: float) -> str:
    return f"{CARTRIDGE}, {seconds:g} s"


def nearest_to_ten(ratios: Iterable[float]) -> float:
    """Where time is shown, and a cache is trained."""
    return min(ratios, key=lambda ratio: abs(ratio - 10))


def groups(rows: Sequence[Row]) -> dict[float, dict[str, list[Row]]]:
    """By ratio, then by scheme."""
    ratios = sorted({float(str(row["ratio"])) for row in rows})
    schemes = list(dict.fromkeys([*SCHEMES, *(str(row["scheme"]) for row in rows)]))
    by_ratio = {
        ratio: {name: [row for row in rows if (row["scheme"], row["ratio"]) == (name, ratio)] for name in schemes}
        for ratio in ratios
    }
    return {ratio: {name: group for name, group in each.items() if group} for ratio, each in by_ratio.items()}


def front(schemes: dict[str, list[Row]]) -> set[str]:
    """Who has nobody that is both faster and nearer to the full cache."""
    points = {name: (mean_of(group, "seconds"), mean_of(group, "kl_answer")) for name, group in schemes.items()}
    return {
        name
        for name, (seconds, kl) in points.items()
        if not any(other[0] < seconds and other[1] < kl for other in points.values())
    }


def summary(rows: Sequence[Row]) -> str:
    lines = []
    for ratio, schemes in groups(rows).items():
        best = front(schemes)
        lines += [
            (
                f"{ratio:.0f}x",
                name,
                f"{mean_of(group, 'recalled'):.1f} of {group[0]['asked']}",
                f"{mean_of(group, 'kl_answer'):.3f}",
                f"{mean_of(group, 'kl_continuation'):.3f}",
                f"{mean_of(group, 'seconds'):.1f}",
                "yes" if name in best else "",
            )
            for name, group in schemes.items()
        ]
    return table(("ratio", "scheme", "recalled", "KL answer", "KL continuation", "seconds", "on the front"), lines)


def plot(rows: Sequence[Row], path: str) -> None:
    """KL of the answer by ratio, and by seconds at the ratio nearest to 10."""
    with drawing(path, (11, 4.2), 2) as (by_size, by_time):
        by_ratio = groups(rows)
        shown = nearest_to_ten(by_ratio)
        names = dict.fromkeys(name for schemes in by_ratio.values() for name in schemes)
        for name in [name for name in names if not name.startswith(CARTRIDGE)]:
            ratios = [ratio for ratio, schemes in by_ratio.items() if name in schemes]
            kl = [mean_of(by_ratio[ratio][name], "kl_answer") for ratio in ratios]
            width = 2.5 if name == DEFAULT else 1.2
            (line,) = by_size.plot(ratios, kl, marker="o", linewidth=width, label=name)
            if name in by_ratio[shown]:
                group = by_ratio[shown][name]
                by_time.plot(mean_of(group, "seconds"), mean_of(group, "kl_answer"), "o", color=line.get_color())
        trained_caches = [group for name, group in by_ratio[shown].items() if name.startswith(CARTRIDGE)]
        if trained_caches:
            points = sorted((mean_of(group, "seconds"), mean_of(group, "kl_answer")) for group in trained_caches)
            by_time.plot(*zip(*points, strict=True), "o-", color="#555555", linewidth=1.2, label=CARTRIDGE)
            by_time.legend(frameon=False, fontsize=7)
        by_size.set_xlabel("tokens for each slot")
        by_time.set_xlabel(f"seconds to make it at {shown:.0f}x")
        for axis in (by_size, by_time):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylabel("KL of the answer from the full cache")
        by_size.legend(frameon=False, fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 5, 10, 20, 50, 100, 200])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument(
        "--cartridge-seconds",
        type=float,
        nargs="+",
        default=[],
        metavar="SECONDS",
        help="train a cache for so long, at the ratio nearest to 10",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", help="write the figures as JSON; what is in it already is not run again")
    parser.add_argument("--plot", help="draw KL by size and by seconds to this file")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, policy=POLICY)
    rows: list[Row] = read_json(args.out)
    for seed in range(args.seeds):
        run(memory, seed, args, rows)
    if args.plot:
        plot(rows, args.plot)
    print(f"\n{args.model}, {args.seeds} seeds; {machine()}\n\n{summary(rows)}")


if __name__ == "__main__":
    main()
