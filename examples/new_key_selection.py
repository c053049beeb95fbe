"""A key selection of your own, compared with the built-in one.

python examples/new_key_selection.py
"""

from dataclasses import dataclass

from torch import Tensor

from am_memory import Memory, MemoryPolicy
from am_memory.solver import Block


@dataclass(frozen=True)
class LargestValues:
    """Keep the keys whose values are the longest vectors, whatever the queries attend to."""

    name: str = "largest_values"

    def __call__(self, block: Block, scores: Tensor, num_slots: Tensor) -> Tensor:
        ranking = block.value.float().norm(dim=-1).argsort(dim=1, descending=True)
        return ranking[:, : int(num_slots.max())]


session = Memory.from_pretrained("demo").session("letter")
session.append("The harbour master keeps a record of the tides. The access code of Lindholm is 4821. " * 8)
for selection in ("highest_attention", LargestValues()):
    branch = session.fork(policy=MemoryPolicy(keep_ratio=0.2, key_selection=selection))
    print(f"{selection}: error of the attention output {branch.compact(1.0).output_error:.2f}")
