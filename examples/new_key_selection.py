"""A key selection of your own, in twenty lines, beside the one that ships.

python examples/new_key_selection.py
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from am_memory import Memory, MemoryPolicy
from am_memory.solver import Block


@dataclass(frozen=True)
class LargestValues:
    """Keep the keys whose values are the longest vectors, whatever the queries look at."""

    name: str = "largest_values"

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        ranking = block.value.float().norm(dim=-1).argsort(dim=1, descending=True)
        return ranking[:, : int(num_slots.max())]


def main() -> None:
    memory = Memory.from_pretrained("demo", policy=MemoryPolicy(trigger_tokens=1024, keep_ratio=0.2))
    session = memory.session("letter")
    session.append(
        "The harbour master kept a careful record of the changing tides. The access code of Lindholm is 4821. "
        "An old librarian repaired the cracked church bell. The night train was known for its rye bread. " * 4
    )
    for selection in ("highest_attention", LargestValues()):
        branch = session.fork(policy=MemoryPolicy(trigger_tokens=1024, keep_ratio=0.2, key_selection=selection))
        report = branch.compact(1.0)
        name = selection if isinstance(selection, str) else selection.name
        print(f"{name:18s} {report.num_slots:.0f} slots per head, error of the output {report.output_error:.2f}")


if __name__ == "__main__":
    main()
