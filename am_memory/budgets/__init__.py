"""Head budgets, one function a file: from the scores of all heads to a ranking of their slots.

A budget is a ranking and not a number. `ranks[h, k]` is the rank of the k-th slot of head h, among the slots of all
heads of all layers. A segment of n slots holds the slots of rank < n, so a shrunken segment is a cut in the ranking.
"""

from am_memory.budgets.adaptive import adaptive_ranks
from am_memory.budgets.calibrated import Calibration, calibrated_ranks, calibration_for
from am_memory.budgets.named import head_ranks
from am_memory.budgets.shared import shared_ranks
from am_memory.budgets.uniform import uniform_ranks

__all__ = [
    "Calibration",
    "adaptive_ranks",
    "calibrated_ranks",
    "calibration_for",
    "head_ranks",
    "shared_ranks",
    "uniform_ranks",
]
