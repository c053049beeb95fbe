"""What a cache has to know of the model behind it. Knows no session and no compaction."""

from __future__ import annotations

from dataclasses import dataclass, field

from am_memory.engines.llama_cpp.decoder import Decoder
from am_memory.engines.llama_cpp.rotation import MeasuredRotation
from am_memory.engines.llama_cpp.state import SequenceState


@dataclass(frozen=True)
class LayerShape:
    """What one layer's cells hold.

    Attributes:
        scaling: factor of the scores before the softmax.
        cell_bytes: keys and values of one cell.
        rotation: how its queries and keys turn with their position.
    """

    num_heads: int
    head_dim: int
    scaling: float
    cell_bytes: int
    rotation: MeasuredRotation = field(repr=False)


@dataclass(frozen=True)
class CellModel:
    """What a cache has to know of the model behind it: who reads, what the layers are, and a state to begin with.

    Attributes:
        template: one cell of any content, which says how states of this model look.
        has_bias: biases are kept beside the cells, not folded into the keys.
        windows: the layers with a sliding window, which are left as they are.
        window_tokens: how far these look back.
    """

    decoder: Decoder
    layers: tuple[LayerShape, ...]
    template: SequenceState
    has_bias: bool = False
    windows: tuple[LayerShape, ...] = ()
    window_tokens: int = 0

    @property
    def num_heads(self) -> int:
        return sum(layer.num_heads for layer in self.layers)

    @property
    def cell_bytes(self) -> int:
        return sum(layer.cell_bytes for layer in self.layers)

    @property
    def window_cell_bytes(self) -> int:
        return sum(layer.cell_bytes for layer in self.windows)
