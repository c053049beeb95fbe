"""RoPE of one layer: rotating keys that are already written to later positions.

Attention depends only on the distance between a query and a key. A key that is rotated by n positions therefore acts
as if its token had come n positions later. Knows no model and no cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """The RoPE of one layer: pairs of a key's elements, each with its own frequency.

    Attributes:
        first, second: (num_pairs,) int64, the two elements of each pair. Elements in no pair do not rotate.
        speeds: (num_pairs,) float64, radians per position. All three tensors are in host memory.
    """

    first: Tensor
    second: Tensor
    speeds: Tensor

    def rotated(self, key: Tensor, distance: Tensor) -> Tensor:
        """The keys at `distance` positions later, in their own dtype, rounded once.

        Args:
            key: (..., num_keys, head_dim), after RoPE.
            distance: in positions, int64 in host memory: (num_keys,), or () if it is the same for all.
        """
        angle = distance.double()[..., None] * self.speeds  # float32 is off by 0.004 radians at 60,000 positions
        cos, sin = (tensor.float().to(key.device) for tensor in (angle.cos(), angle.sin()))
        first, second = (elements.to(key.device) for elements in (self.first, self.second))
        one, other = key[..., first].float(), key[..., second].float()
        rotated = key.clone()
        rotated[..., first] = (one * cos - other * sin).to(key.dtype)
        rotated[..., second] = (one * sin + other * cos).to(key.dtype)
        return rotated
