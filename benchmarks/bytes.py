"""The bytes of a cache, against the bytes that its slots and exact tokens need.

    python benchmarks/bytes.py --model MODEL

Needed: 2 head_dim + 1 numbers for each slot (key, value, bias) and 2 head_dim for each exact token of each KV head, in
the model's dtype. Measured: the bytes of all tensors that attention reads, with the spare room of the tail. Each slot's
position and rank, 8 bytes that stay in host memory, are not among them.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import machine, table, write_json

from am_memory import Memory, MemoryPolicy, Session
from am_memory.cli.letters import prose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Result:
    """One cache."""

    dtype: str
    keep_ratio: float
    case: str
    compactions: int
    slots_per_head: float
    exact_tokens: int
    measured_bytes: int
    needed_bytes: float

    @property
    def excess(self) -> float:
        return self.measured_bytes / self.needed_bytes - 1


def measure(session: Session, dtype: str, keep_ratio: float, case: str) -> Result:
    config: Any = session.engine.model.config.get_text_config()  # type: ignore[attr-defined]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    num_heads = config.num_key_value_heads * len(session.engine.new_cache().compactable)
    stats, item_size = session.stats, DTYPES[dtype].itemsize
    slots = stats.kv_tokens - stats.exact_tokens
    numbers = num_heads * (slots * (2 * head_dim + 1) + stats.exact_tokens * 2 * head_dim)
    return Result(
        dtype, keep_ratio, case, stats.num_compactions, slots, stats.exact_tokens, stats.kv_bytes, numbers * item_size
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", help="write the figures as JSON")
    args = parser.parse_args()
    results = []
    for dtype in args.dtypes:
        memory = Memory.from_pretrained(
            args.model, dtype=DTYPES[dtype], policy=MemoryPolicy(trigger_tokens=1.0, pinned="sinks", originals="drop")
        )
        ids = memory.tokenize(" ".join(prose(random.Random(0), 200)))[: args.tokens]
        exact = memory.session("exact")
        exact.append(ids)
        results.append(measure(exact, dtype, 1.0, "nothing compacted"))
        for ratio in args.ratios:
            policy = memory.policy.model_copy(update={"keep_ratio": ratio, "max_compact_tokens": args.tokens})
            for case, fraction in (("oldest half", 0.5), ("everything", 1.0)):
                session = exact.fork(policy=policy)
                session.compact(fraction)
                results.append(measure(session, dtype, ratio, case))
            session = exact.fork(policy=policy)
            for _ in range(3):
                session.compact(0.5)
                session.append(ids[: args.tokens // 8])
            results.append(measure(session, dtype, ratio, "three times"))
        write_json(args.out, [{**asdict(result), "excess": result.excess} for result in results])
    rows = [
        (
            result.dtype,
            result.case,
            f"{result.keep_ratio:g}",
            f"{result.slots_per_head:.1f}",
            result.exact_tokens,
            f"{result.measured_bytes:,}",
            f"{result.needed_bytes:,.0f}",
            f"{result.excess:+.2%}",
        )
        for result in results
    ]
    header = ("dtype", "compacted", "keep_ratio", "slots per head", "exact tokens", "bytes", "needed", "excess")
    print(f"{args.model}; {machine()}\n\n{table(header, rows)}\n")
    print(f"largest excess: {max(result.excess for result in results):+.2%}")


if __name__ == "__main__":
    main()
