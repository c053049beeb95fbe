"""The switches of a fit. Their defaults are the method as benchmarked; other values are for ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from am_memory.errors import InvalidInput


@dataclass(frozen=True)
class FitOptions:
    """How biases and values are fitted (arXiv:2602.16284, section 3.3).

    Attributes:
        bias_bounds: lowest (<= 0) and highest (>= 0) bias.
        bias_ridge: pull of the biases toward 0, relative to the mean diagonal of their Gram matrix; 0 in the paper.
        ridge: pull of the values toward the originals, relative to the mean diagonal of their Gram matrix.
        fit_bias: False leaves every bias 0.
        fit_values: False leaves the original values.
        relative_mass: True gives the mass of every query the same weight. False weighs it by the mass over its largest
            exp(logit), as in the paper.

    Raises:
        InvalidInput: bounds that exclude a bias of 0.
    """

    bias_bounds: tuple[float, float] = (-3.0, 3.0)
    bias_ridge: float = 0.0
    ridge: float = 1e-2
    fit_bias: bool = True
    fit_values: bool = True
    relative_mass: bool = True

    def __post_init__(self) -> None:
        low, high = self.bias_bounds
        if not -math.inf < low <= 0 <= high < math.inf:
            raise InvalidInput(
                f"bias_bounds ({low}, {high}) must be finite, the first at most 0 and the second at least 0"
            )


DEFAULT_OPTIONS = FitOptions()
