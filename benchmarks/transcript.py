"""A conversation written down as a play, for models without a chat template, those with sliding windows among them.

    python benchmarks/transcript.py --model MODEL.gguf

In each of six turns Anna tells Bob a report with three codes in it, and the model writes Bob's line. The cache is
compacted whenever the trigger is reached, with the policy's own defaults. Then each code is asked for, and what the
model expects is compared with the full cache of the same tokens, with eviction (the same keys, nothing fitted), and
with the last tokens read again, as many as ours holds in the layers that can be compacted. Sliding windows stay in
every scheme.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import get_args

from common import kl_divergence, machine, table, write_json
from torch import Tensor

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.letters import Fact, facts, hide
from am_memory.engines.names import EngineName

TURNS, CODES_IN_TURN, SENTENCES_IN_TURN, LINE_TOKENS = 6, 3, 22, 24
SINKS = 4
PLAIN = MemoryPolicy(trigger_tokens=1.0, pinned=SINKS, originals="drop")
"""Compacts nothing within the model's window."""
LINE = Sampling(temperature=0.0, stop=("\n",))


def asked(session: Session, fact: Fact) -> tuple[bool, Tensor]:
    """Whether the code is what the model expects, and the logits at its tokens."""
    question = f"\nAnna: {fact.question}\nBob: {fact.opening}"
    start, answered = session.engine.encode(question), session.engine.encode(f"{question} {fact.code}")
    logits = session.logits(answered)[len(start) :]
    return logits.argmax(-1).tolist() == answered[len(start) :], logits


def converse(session: Session, told: Sequence[Fact], rng: random.Random) -> None:
    """Anna tells her codes, some in each turn; the model answers for Bob."""
    for turn in range(TURNS):
        report = hide(rng, told[CODES_IN_TURN * turn : CODES_IN_TURN * (turn + 1)], SENTENCES_IN_TURN)
        session.append(f"Anna: {report}\nBob:" if turn == 0 else f"\nAnna: {report}\nBob:")
        for _ in session.generate(LINE_TOKENS, LINE):
            pass


def run(memory: Memory, seed: int, policy: MemoryPolicy) -> list[dict[str, object]]:
    rng = random.Random(seed)
    told = facts(rng, TURNS * CODES_IN_TURN)
    sessions = {"full cache": memory.scratch(), "ours": memory.scratch(policy=policy)}
    converse(sessions["ours"], told, rng)
    tokens = sessions["ours"].tokens
    sessions["eviction"] = memory.scratch(policy=policy.model_copy(update={"experiments": Experiments(fit="nothing")}))
    sessions["truncated"] = memory.scratch()
    for name in ("full cache", "eviction"):
        sessions[name].append(tokens)
    num_kept = round(sessions["ours"].stats.kv_tokens) - SINKS
    sessions["truncated"].append([*tokens[:SINKS], *tokens[-num_kept:]])
    expected = [asked(sessions["full cache"], fact)[1] for fact in told]
    rows = []
    for name, session in sessions.items():
        answers = [asked(session, fact) for fact in told]
        kl = [kl_divergence(full, logits) for full, (_, logits) in zip(expected, answers, strict=True)]
        rows.append(
            {
                "seed": seed,
                "scheme": name,
                "recalled": sum(is_right for is_right, _ in answers),
                "asked": len(told),
                "kl_answer": sum(kl) / len(kl),
                "tokens": session.stats.logical_tokens,
                "kv_tokens": session.stats.kv_tokens,
                "kv_bytes": session.stats.kv_bytes,
                "compactions": session.stats.num_compactions,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--engine", choices=get_args(EngineName), default="transformers")
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--trigger", type=int, default=1024, help="in tokens")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    memory = Memory.from_pretrained(args.model, engine=args.engine, policy=PLAIN)
    policy = MemoryPolicy(trigger_tokens=args.trigger, keep_ratio=args.keep_ratio, pinned=SINKS, originals="drop")
    rows = [row for seed in range(args.seeds) for row in run(memory, seed, policy)]
    write_json(args.out, rows)
    lines = [
        (
            row["seed"],
            row["scheme"],
            f"{row['recalled']} of {row['asked']}",
            f"{row['kl_answer']:.3f}",
            f"{row['tokens']:,}",
            f"{row['kv_tokens']:.0f}",
            f"{row['kv_bytes']:,}",
            row["compactions"] or "",
        )
        for row in rows
    ]
    header = ("seed", "scheme", "recalled", "KL answer", "tokens", "in the cache", "bytes", "compactions")
    kept = f"trigger {args.trigger}, a share of {args.keep_ratio} kept"
    print(f"{args.model}, {args.engine}, {kept}; {machine()}\n\n{table(header, lines)}")


if __name__ == "__main__":
    main()
