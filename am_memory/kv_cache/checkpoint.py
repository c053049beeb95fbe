"""Checkpoints: where a cache can go back to, although some of its layers cannot drop a token.

A full sliding window has forgotten what came before it, and a recurrent state has seen every token. A checkpoint holds
copies of these layers' states; the other layers are cut. Knows no context.
"""

from __future__ import annotations

from typing import NamedTuple

from am_memory.kv_cache.cache import CacheState, Snapshot
from am_memory.kv_cache.layers import LayerState, RecurrentState, SlidingState, TailState


class Checkpoint(NamedTuple):
    """The states of the layers that cannot drop tokens, when the cache held `num_tokens` logical tokens.

    Attributes:
        states: of these layers in their order, in host memory.
    """

    num_tokens: int
    states: tuple[SlidingState | RecurrentState, ...]

    @classmethod
    def of(cls, num_tokens: int, state: Snapshot) -> Checkpoint:
        """A checkpoint of a cache of `num_tokens` logical tokens."""
        return cls(num_tokens, tuple(layer.to("cpu") for layer in state.layers if not isinstance(layer, TailState)))

    @property
    def nbytes(self) -> int:
        """Host memory, in bytes."""
        return sum(state.nbytes for state in self.states)

    def applied(self, state: Snapshot) -> CacheState:
        """The state of a cache that goes back to the checkpoint; what it forgets must be in its exact tail."""
        states = iter(self.states)
        layers: list[LayerState] = []
        for layer in state.layers:
            if isinstance(layer, TailState):
                if layer.buffer is not None:
                    layer.buffer.is_shared = True  # with `state`, which may be restored after tokens are read again
                layers.append(layer._replace(length=self.num_tokens - layer.start))
            else:
                layers.append(next(states).to(layer.device))
        return CacheState(tuple(layers), state.segments, state.num_pinned_slots)
