"""How many slots each head gets: one function a file, from the heads' scores to a ranking of their slots.

A budget is a ranking, not a number: `ranks[head, k]` says when head `head` gets its k-th slot, counted over all heads
of all layers. A segment of n slots holds the slots of rank < n; shrinking it is a cut in the same ranking.
"""

from am_memory.budgets.adaptive import adaptive_ranks
from am_memory.budgets.calibrated import Calibration, calibrated_ranks, calibration_for
from am_memory.budgets.shared import shared_ranks
from am_memory.budgets.uniform import uniform_ranks

__all__ = ["Calibration", "adaptive_ranks", "calibrated_ranks", "calibration_for", "shared_ranks", "uniform_ranks"]
