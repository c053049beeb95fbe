"""What each layer of a model caches: a layer's kind, and the cache layers that it needs."""

from __future__ import annotations

from typing import NamedTuple

from am_memory.kv_cache.layers import CompactableLayer, LatentLayer, SlidingLayer
from am_memory.kv_cache.recurrent import EmptyLayer, RecurrentLayer
from am_memory.kv_cache.rotation import Rotation

CacheLayer = CompactableLayer | SlidingLayer | RecurrentLayer | EmptyLayer


class LayerKind(NamedTuple):
    """What a layer caches; by default the keys and values of all tokens.

    Attributes:
        has_keys: it has attention.
        window: only this many last tokens are attended to; None: all of them.
        num_states: recurrent states, which stand beside the keys if there are both.
        has_latents: latent vectors stand for the keys and values of all heads (MLA).
        num_readers: layers of the model that attend to its keys: this one, and those without keys of their own.
    """

    has_keys: bool = True
    window: int | None = None
    num_states: int = 0
    has_latents: bool = False
    num_readers: int = 1

    @property
    def has_both(self) -> bool:
        """Whether it has keys and recurrent states."""
        return self.has_keys and self.num_states > 0

    @property
    def is_compactable(self) -> bool:
        """Whether its keys and values can be compacted."""
        return self.has_keys and self.window is None

    def new_layer(self, rotation: Rotation | None) -> CacheLayer:
        """The cache of a layer of this kind; its states are apart if it has keys as well."""
        if not self.has_keys:
            return RecurrentLayer(self.num_states) if self.num_states else EmptyLayer()
        if self.window is not None:
            return SlidingLayer(self.window)
        return (LatentLayer if self.has_latents else CompactableLayer)(rotation, self.num_readers)


FULL_ATTENTION = LayerKind()
