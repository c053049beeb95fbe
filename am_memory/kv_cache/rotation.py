"""How a layer turns its keys with their position (RoPE), and turning them further once they are written.

Attention sees only how far a query stands from a key, so a key that is turned by some positions stands as if its token
had come so much later. Knows no model and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """Of one layer: pairs of a key's elements, each of which turns at a speed of its own.

    Attributes:
        first, second: (num_pairs,) int64, the elements of each pair; what is in none does not turn.
        speeds: (num_pairs,) float64, radians per position; all three in host memory.
    """

    first: Tensor
    second: Tensor
    speeds: Tensor

    def turned(self, key: Tensor, distance: Tensor) -> Tensor:
        """The keys as they would be so many positions later, in their own dtype, rounded once.

        Args:
            key: (..., num_keys, head_dim), after RoPE.
            distance: in positions, (num_keys,) or () for all alike, int64 in host memory.
        """
        angle = distance.double()[..., None] * self.speeds  # in float32, 60,000 positions are known to 0.004 radians
        cos, sin = (of.float().to(key.device) for of in (angle.cos(), angle.sin()))
        first, second = (of.to(key.device) for of in (self.first, self.second))
        one, other = key[..., first].float(), key[..., second].float()
        turned = key.clone()
        turned[..., first] = (one * cos - other * sin).to(key.dtype)
        turned[..., second] = (one * sin + other * cos).to(key.dtype)
        return turned
