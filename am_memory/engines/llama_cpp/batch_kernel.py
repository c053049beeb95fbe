"""Reads one token into each of several caches in one pass: llama.cpp's own flash attention over all of them.

In llama.cpp's graph all tokens attend to one set of cells. Here each token is a stream of its own, as in llama.cpp's
batches of separate sequences: keys, values and masks of the streams lie at equal distances, in `Seats`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from am_memory.engines.base import OnQuery
from am_memory.engines.llama_cpp.graph import LayerNodes, PointedGraph, own_source
from am_memory.engines.llama_cpp.library import read_tensor
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.own_attention import attend
from am_memory.engines.llama_cpp.pool import Pool
from am_memory.engines.llama_cpp.seats import Seats
from am_memory.engines.llama_cpp.source import Source
from am_memory.errors import UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer

MOST_CACHES = 256
"""llama.cpp's most sequences of one context."""
FAR = 2**62
"""More bytes than there are."""


class _Row(NamedTuple):
    """One cache of a pass, in the order of seats."""

    cache: KVCache
    layers: list[CompactableLayer]
    token_id: int
    on_query: OnQuery | None


class _Streams:
    """The tensors of one layer's operations that differ if each token is a stream."""

    def __init__(self, nodes: LayerNodes) -> None:
        self.query = own_source(nodes.attention, 0)
        self.indices = [own_source(write, 1) for write in nodes.writes]
        if any(index.type != GGMLQuantizationType.I64 for index in self.indices):
            raise UnsupportedModel("this llama.cpp does not store keys and values at rows of 64 bits")
        self.query.nb[3] = self.query.nb[1]

    def divide(self, nodes: LayerNodes, num_tokens: int) -> None:
        """Make each token a stream; the output's memory stays as it was."""
        self.query.ne[1], self.query.ne[3] = 1, num_tokens
        nodes.attention.ne[2], nodes.attention.ne[3] = 1, num_tokens
        nodes.attention.nb[3] = nodes.attention.nb[2]


class BatchKernel:
    """Reads a token into each of several `KVCache`s whose layers are all compactable.

    Args:
        source: owner of the model.
        params: parameters of the context.
        model: the tested model.
    """

    def __init__(self, source: Source, params: Any, model: CellModel) -> None:
        self._source, self._params, self._shapes = source, params, model.in_order
        self._graph: PointedGraph | None = None
        self._seats: Seats | None = None
        self._rows: list[_Row] = []
        self._streams: dict[int, tuple[LayerNodes, _Streams]] = {}
        self._indices = np.empty(0, dtype=np.int64)  # (num_layers, 2, num_caches): where keys and values are written

    @torch.no_grad()
    def read(self, caches: Sequence[KVCache], token_ids: Sequence[int], on_query: Sequence[OnQuery | None]) -> Tensor:
        """Read token i into cache i; returns logits, (num_caches, vocab_size) float32.

        Args:
            caches: each has read a token before.
        """
        graph = self._graph_for(len(caches))
        seats = self._take_seats(caches)
        order = sorted(range(len(caches)), key=seats.__getitem__)
        self._rows = [
            _Row(caches[index], caches[index].compactable, token_ids[index], on_query[index]) for index in order
        ]
        self._indices = np.empty((len(self._shapes), 2, len(caches)), dtype=np.int64)
        try:
            logits = graph.compute(
                [row.token_id for row in self._rows],
                [row.cache.num_tokens for row in self._rows],
                self._stop if any(row.on_query for row in self._rows) else None,
            )
        finally:
            self._rows = []
        for cache in caches:
            for layer, shape in zip(cache.compactable, self._shapes, strict=True):
                layer.length += 1
                layer.scaling = shape.scaling
        return logits[torch.tensor(order).argsort()]

    def _graph_for(self, num_caches: int) -> PointedGraph:
        """A context for at least so many sequences."""
        if self._graph is None or self._graph.num_sequences < num_caches:
            size = min(max(4, 2 * num_caches), MOST_CACHES)
            self._graph, self._streams = None, {}
            self._graph = PointedGraph(self._source, self._params, len(self._shapes), size, self._point)
        return self._graph

    def _take_seats(self, caches: Sequence[KVCache]) -> list[int]:
        seats = None if self._seats is None else self._seats.take(caches)
        if seats is None:
            self._seats = Seats(caches, [shape.num_attention_heads for shape in self._shapes])
            seats = list(range(len(caches)))
        return seats

    def _point(self, nodes: LayerNodes, index: int) -> None:
        """Point a layer's operations to the seats."""
        known, streams = self._streams.get(index, (None, None))
        if known is not nodes or streams is None:
            streams = _Streams(nodes)
            self._streams[index] = nodes, streams
        streams.divide(nodes, len(self._rows))
        addresses = list[tuple[int, ...]]()
        for row in self._rows:
            layer, pool = self._at(row, index)
            pool.show(layer.length + 1)
            addresses.append(pool.addresses(layer.length))
        num_seen = max(pool.num_seen(layer.length + 1) for layer, pool in (self._at(row, index) for row in self._rows))
        self._indices[index] = np.transpose(addresses) - np.array(addresses[0])[:, None]
        for write, where, rows, address in zip(
            nodes.writes, streams.indices, self._indices[index], addresses[0], strict=True
        ):
            write.data, write.nb[1], write.ne[1] = address, 1, FAR  # an index is a distance in bytes
            where.data = rows.ctypes.data
        self._point_to_seen(nodes, index, num_seen)

    def _point_to_seen(self, nodes: LayerNodes, index: int, num_seen: int) -> None:
        """Attend to so many rows of each seat."""
        assert self._seats is not None
        _, first = self._at(self._rows[0], index)
        nodes.attend_to(first, (first.seen_key, first.seen_value, first.mask))
        for tensor in (nodes.key, nodes.value, nodes.mask):
            tensor.ne[3], tensor.nb[3] = len(self._rows), self._seats.layers[index].seat_bytes
        nodes.key.ne[1] = nodes.value.ne[1] = num_seen

    def _at(self, row: _Row, index: int) -> tuple[CompactableLayer, Pool]:
        """One layer of a cache, and its pool."""
        layer = row.layers[index]
        assert isinstance(layer.buffer, Pool)
        return layer, layer.buffer

    def _stop(self, index: int) -> None:
        """Give the queries of a layer to those who want them."""
        assert self._graph is not None
        shape, query = self._shapes[index], read_tensor(self._graph.nodes[index].query_address).float()
        for column, row in enumerate(self._rows):
            if row.on_query is None:
                continue
            layer, pool = self._at(row, index)
            own = query[None, :, column : column + 1]
            _, log_mass = attend(own, *pool.exact(layer.length + 1), pool.slots, shape.scaling)
            grouped = shape.num_heads, -1, 1
            row.on_query(index, own.reshape(*grouped, own.shape[3]), log_mass.reshape(grouped))
