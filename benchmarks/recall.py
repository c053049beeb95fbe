"""Recall and faithfulness after compaction: codes hidden in prose, asked for afterwards.

    python benchmarks/recall.py once  --model MODEL --seeds 5     one compaction, 5x and 10x
    python benchmarks/recall.py turns --model MODEL --seeds 5     six turns, a compaction after each, 10x in all

Recalled means: given the question and the opening of the answer, greedy decoding gives the code, digit for digit. KL is
KL(full cache || compacted cache), mean over tokens, on the codes and on an unrelated continuation.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass
from typing import get_args

from common import kl_divergence, machine, mean_spread, table, write_json
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Session
from am_memory.cli.letters import Fact, facts, hide, prose
from am_memory.cli.questions import fact_turn, open_answer
from am_memory.engines.base import Message
from am_memory.engines.names import EngineName
from am_memory.solver import OMP

CONTINUATION = (
    " Bread begins with flour, water, salt and time. The baker mixes the dough early in the morning, lets "
    "it rest under a cloth, and folds it every half hour until it feels alive. Steam in the oven keeps "
    "the crust soft while the loaf grows; later the steam is let out, so that the crust turns brown and "
    "crisp. A good loaf sings when it cools: the crust crackles as it shrinks, and the smell fills the "
    "whole street. Most people buy their bread without a thought for any of this, but once you have baked "
    "your own, you will never again pay for a bad loaf."
)
POLICY = MemoryPolicy(trigger_tokens=1.0, pinned="sinks", max_compact_tokens=4000, originals="drop")
ONCE = {
    "AM (default)": {},
    "AM uniform": {"head_budget": "uniform"},
    "eviction": {"experiments": Experiments(fit="nothing")},
    "eviction, uniform": {"experiments": Experiments(fit="nothing"), "head_budget": "uniform"},
}
ON_REQUEST = {
    "AM, OMP": {"key_selection": OMP.fast()},
    "AM, repeat": {"reference_queries": ("repeat",)},
    "AM, self-study": {"reference_queries": ("self_study",)},
    "AM, repeat and self-study": {"reference_queries": ("repeat", "self_study")},
    "AM of a summary": {"experiments": Experiments(summary_tokens=256)},
    "AM, on-policy": {"experiments": Experiments(on_policy=True)},
    "AM uniform, on-policy": {"experiments": Experiments(on_policy=True), "head_budget": "uniform"},
    "AM, int8": {"segment_dtype": "int8"},
}
"""Run where they are named: slow, or close to the default."""
TURNS = {
    "segments (ours)": {},
    "segments, nothing fitted": {"experiments": Experiments(fit="nothing")},
    "recompact everything": {"experiments": Experiments(recompaction="refit")},
}


@dataclass(frozen=True)
class Result:
    """One scheme on one seed; `by_turn` is the share recalled of each turn's codes."""

    scheme: str
    ratio: float
    seed: int
    recalled: int
    asked: int
    by_turn: list[int]
    kl_answer: float
    kl_continuation: float
    kv_tokens: float
    seconds: float


def ask(session: Session, fact: Fact) -> tuple[bool, Tensor]:
    """Whether the code is recalled, and the logits at its tokens; the session's last message must be an answer."""
    engine, turn = session.engine, fact_turn(session.engine, fact)
    if session.messages and session.policy.originals != "drop":
        session, turn = session.fork(), fact.opening
        open_answer(session, fact.question)  # looks the question up
    context, code = engine.encode(turn), engine.encode(" " + fact.code)
    logits = session.logits([*context, *code])[len(context) :]
    return logits.argmax(-1).tolist() == code, logits


class Judge:
    """Asks a session all its facts and compares with the full cache."""

    def __init__(self, full: Session, told: list[list[Fact]], continuation: str) -> None:
        self.told = told
        self.continuation = continuation
        self.full = {fact: ask(full, fact) for turn in told for fact in turn}
        self.full_continuation = full.logits(continuation)

    def judge(self, session: Session, scheme: str, ratio: float, seed: int, seconds: float) -> Result:
        answers = {fact: ask(session, fact) for fact in self.full}
        kl = [kl_divergence(self.full[fact][1], logits) for fact, (_, logits) in answers.items()]
        return Result(
            scheme=scheme,
            ratio=ratio,
            seed=seed,
            recalled=sum(is_right for is_right, _ in answers.values()),
            asked=len(answers),
            by_turn=[sum(answers[fact][0] for fact in turn) for turn in self.told],
            kl_answer=sum(kl) / len(kl),
            kl_continuation=kl_divergence(self.full_continuation, session.logits(self.continuation)),
            kv_tokens=session.stats.kv_tokens,
            seconds=seconds,
        )


@dataclass(frozen=True)
class Scene:
    """12 codes in about 750 tokens, and about 330 tokens after them.

    Attributes:
        full: has read all of it.
        recent: what comes after the codes.
        old_fraction: of the cache, as `Session.compact` has it: all but what is recent.
    """

    full: Session
    recent: list[Message]
    judge: Judge
    old_fraction: float


def set_scene(memory: Memory, seed: int) -> Scene:
    rng = random.Random(seed)
    told = facts(rng, 12)
    full = memory.session(f"once-{seed}")
    report_turn = {"role": "user", "content": "Read this report. " + hide(rng, told, 32)}
    full.append([report_turn, {"role": "assistant", "content": "I have read it."}])
    num_old = full.stats.logical_tokens
    recent: list[Message] = [
        {"role": "user", "content": " ".join(prose(rng, 18))},
        {"role": "assistant", "content": "I see."},
    ]
    full.append(recent)
    fraction = (num_old - 4) / (full.stats.logical_tokens - 1 - 4)
    return Scene(full, recent, Judge(full, [told], CONTINUATION), fraction)


def once(memory: Memory, seed: int, ratios: list[float], schemes: dict[str, dict]) -> list[Result]:
    """One compaction of what has the codes in it."""
    scene = set_scene(memory, seed)
    full, judge = scene.full, scene.judge
    results = [judge.judge(full, "full cache", 1.0, seed, 0.0)]
    report(results[-1])
    for ratio in ratios:
        for scheme, options in schemes.items():
            session = full.fork(policy=POLICY.model_copy(update={"keep_ratio": 1 / ratio, **options}))
            started = time.perf_counter()
            session.compact(scene.old_fraction)
            results.append(judge.judge(session, scheme, ratio, seed, time.perf_counter() - started))
            report(results[-1])
    dropped = memory.session(f"dropped-{seed}")
    dropped.append(scene.recent)
    results.append(judge.judge(dropped, "truncation", float("inf"), seed, 0.0))
    report(results[-1])
    memory.delete(full.name)
    memory.delete(dropped.name)
    return results


def turns(memory: Memory, seed: int, ratios: list[float], schemes: dict[str, dict]) -> list[Result]:
    """24 codes in six turns of 325 to 513 tokens, everything compacted after each turn."""
    rng = random.Random(1000 + seed)
    told = facts(rng, 24)
    by_turn = [told[4 * turn : 4 * turn + 4] for turn in range(6)]
    texts = [
        [
            {"role": "user", "content": "Read this report. " + hide(rng, turn, rng.randint(15, 22))},
            {"role": "assistant", "content": "I have read it."},
        ]
        for turn in by_turn
    ]
    full = memory.session(f"turns-{seed}")
    for text in texts:
        full.append(text)
    judge = Judge(full, by_turn, CONTINUATION)
    results = [judge.judge(full, "full cache", 1.0, seed, 0.0)]
    report(results[-1])
    for ratio in ratios:
        for scheme, options in schemes.items():
            policy = POLICY.model_copy(update={"keep_ratio": 1 / ratio, **options})
            session = memory.session(f"turns-{seed}-{ratio}-{scheme}", policy=policy)
            seconds = 0.0
            for text in texts:
                session.append(text)
                started = time.perf_counter()
                session.compact(1.0)
                seconds += time.perf_counter() - started
            results.append(judge.judge(session, scheme, ratio, seed, seconds))
            report(results[-1])
            memory.delete(session.name)
    memory.delete(full.name)
    return results


def report(result: Result) -> None:
    print(
        f"seed {result.seed}  {result.ratio:4.0f}x  {result.scheme:26s} {result.recalled:2d}/{result.asked}  "
        f"{result.by_turn}  KL answer {result.kl_answer:.3f}  continuation {result.kl_continuation:.3f}  "
        f"{result.kv_tokens:.0f} kv tokens  {result.seconds:.1f} s",
        flush=True,
    )


def summary(results: list[Result]) -> str:
    rows = []
    for ratio, scheme in dict.fromkeys((result.ratio, result.scheme) for result in results):
        group = [result for result in results if (result.ratio, result.scheme) == (ratio, scheme)]
        turns_mean = [sum(turn) / len(group) for turn in zip(*(result.by_turn for result in group), strict=True)]
        rows.append(
            (
                scheme,
                f"{ratio:.0f}x",
                f"{mean_spread((r.recalled for r in group), 1)} of {group[0].asked}",
                " ".join(f"{turn:.1f}" for turn in turns_mean),
                mean_spread(r.kl_answer for r in group),
                mean_spread(r.kl_continuation for r in group),
                mean_spread((r.seconds for r in group), 1),
            )
        )
    return table(("scheme", "ratio", "recalled", "by turn", "KL answer", "KL continuation", "seconds"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["once", "turns"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="+")
    parser.add_argument("--calibration", help='a file of am-memory calibrate, or "calibrated": one scheme more')
    parser.add_argument("--schemes", nargs="+", help="only these")
    parser.add_argument("--out")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, engine=args.engine, policy=POLICY)
    run, schemes, ratios = (once, ONCE, [5.0, 10.0]) if args.mode == "once" else (turns, TURNS, [10.0])
    if args.calibration:
        schemes = {**schemes, "AM calibrated": {"head_budget": args.calibration}}
    if args.schemes:
        schemes = {name: options for name, options in (schemes | ON_REQUEST).items() if name in args.schemes}
    results = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        results += run(memory, seed, args.ratios or ratios, schemes)
        write_json(args.out, [asdict(result) for result in results])
    caption = f"{args.model}, {args.engine}, {args.seeds} seeds, mean ± standard deviation; {machine()}"
    print(f"\n{caption}\n\n{summary(results)}")


if __name__ == "__main__":
    main()
