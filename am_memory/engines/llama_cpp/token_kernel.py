"""Reads single tokens: llama.cpp's own flash attention over the slots and tails of a cache of this project.

Knows no graph but through `graph.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from am_memory.engines.llama_cpp.graph import LayerNodes, PointedGraph
from am_memory.engines.llama_cpp.library import read_tensor
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.own_attention import OnOutput, attend, output_at
from am_memory.engines.llama_cpp.pool import Pool, WindowPool, pooled, window_pooled
from am_memory.engines.llama_cpp.source import Source
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer


class TokenKernel:
    """Reads single tokens into `KVCache`s.

    Args:
        source: owner of the model.
        params: parameters of the context.
        model: the tested model.

    Attributes:
        on_output: called with the attention of each layer as this project computes it and as llama.cpp has, see
            `OwnAttention.on_output`. None: llama.cpp does not stop.
    """

    def __init__(self, source: Source, params: Any, model: CellModel) -> None:
        self._shapes = model.in_order
        self._pools: list[tuple[Pool | WindowPool, int]] = []
        self.on_output: OnOutput | None = None
        self._graph = PointedGraph(source, params, len(self._shapes), 1, self._point)

    @torch.no_grad()
    def read(self, cache: KVCache, token_id: int) -> Tensor:
        """Read a token; returns its logits, (1, vocab_size) float32.

        Args:
            cache: it has read a token before.
        """
        pools = self._pools = [
            (pooled(layer, shape.num_attention_heads), layer.length)
            if isinstance(layer, CompactableLayer)
            else window_pooled(layer)
            for layer, shape in zip(cache.with_keys, self._shapes, strict=True)
        ]
        try:
            logits = self._graph.compute([token_id], [cache.num_tokens], self._compare if self.on_output else None)
        finally:
            self._pools = []
        for layer, shape, (pool, num_tokens) in zip(cache.with_keys, self._shapes, pools, strict=True):
            if isinstance(layer, CompactableLayer):
                layer.length += 1
                layer.scaling = shape.scaling
            elif isinstance(pool, WindowPool):
                pool.hand_to(layer, num_tokens + 1)
        return logits

    def _point(self, nodes: LayerNodes, index: int) -> None:
        point_to_pool(nodes, *self._pools[index])

    def _compare(self, index: int) -> None:
        assert self.on_output is not None
        nodes, (pool, num_tokens), scaling = self._graph.nodes[index], self._pools[index], self._shapes[index].scaling
        query = read_tensor(nodes.query_address)[None].float()
        output, _ = attend(query, *pool.exact(num_tokens + 1), pool.slots, scaling)
        self.on_output(output, output_at(nodes.attention_address))


def point_to_pool(nodes: LayerNodes, pool: Pool | WindowPool, num_tokens: int) -> None:
    """Write the next token's key and value behind `num_tokens` others, and attend to all of them."""
    for write, tensor, tail in zip(nodes.writes, (nodes.key, nodes.value), (pool.key, pool.value), strict=True):
        write.data = tail.data_ptr() + num_tokens * tail.stride(2) * tail.element_size()
        tensor.ne[1] = pool.num_seen(num_tokens + 1)
    nodes.attend_to(pool, (pool.seen_key, pool.seen_value, pool.mask))
