"""Facts about the model that a llama.cpp cache needs. Knows no session and no compaction."""

from __future__ import annotations

from dataclasses import dataclass, field

from am_memory.engines.llama_cpp.decoder import Decoder
from am_memory.engines.llama_cpp.rotation import MeasuredRotation
from am_memory.engines.llama_cpp.state import SequenceState


@dataclass(frozen=True, eq=False)
class LayerShape:
    """The shape of one layer's cells.

    Attributes:
        num_heads: KV heads.
        num_attention_heads: query heads.
        scaling: factor of the scores before the softmax.
        cell_bytes: bytes of the keys and values of one cell.
        rotation: the RoPE of its queries and keys.
    """

    num_heads: int
    num_attention_heads: int
    head_dim: int
    scaling: float
    cell_bytes: int
    rotation: MeasuredRotation = field(repr=False)


@dataclass(frozen=True)
class CellModel:
    """Facts about the model that its caches need.

    Attributes:
        decoder: reads tokens.
        layers: the compactable layers.
        in_order: all layers, in the order in which they are computed.
        template: a state of one cell, which shows the layout of this model's states.
        windows: the layers with a sliding window, which are not compacted.
        window_tokens: the size of that window.
    """

    decoder: Decoder
    layers: tuple[LayerShape, ...]
    in_order: tuple[LayerShape, ...]
    template: SequenceState
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
