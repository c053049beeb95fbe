"""Reads single tokens: llama.cpp's own flash attention over the slots and tails of a cache of this project.

In llama.cpp's graph of one token, each layer writes a key and a value into its cells, and attends to these cells. Both
operations are pointed at this project's memory instead, once for each graph; then only addresses and sizes change from
token to token. llama.cpp does not stop, and computes the whole token in one go.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from am_memory.engines.llama_cpp.capture import OP_OFFSET
from am_memory.engines.llama_cpp.context import CELLS_STEP, Context
from am_memory.engines.llama_cpp.library import (
    GGMLTensor,
    ggml,
    ggml_type_of,
    is_in_host_memory,
    library,
    read_tensor,
    tensor_at,
)
from am_memory.engines.llama_cpp.model import CellModel
from am_memory.engines.llama_cpp.own_attention import OnOutput, attend, output_at
from am_memory.engines.llama_cpp.pool import Pool, WindowPool, pooled, window_pooled
from am_memory.errors import EngineFailed, UnsupportedModel
from am_memory.kv_cache.cache import KVCache
from am_memory.kv_cache.layers import CompactableLayer

PADDING_BYTES = 16
"""What `struct ggml_tensor` has behind the fields of `GGMLTensor`."""


class _LayerNodes:
    """The operations of one layer in llama.cpp's graph, and the tensors that they are given.

    Args:
        write_key, write_value: addresses of the operations that store a token's key and value.
        attention: address of the attention.

    Raises:
        UnsupportedModel: they do not lie in host memory.
    """

    def __init__(self, write_key: int, write_value: int, attention: int) -> None:
        if not all(map(is_in_host_memory, (write_key, write_value, attention))):
            raise UnsupportedModel("llama.cpp attends on a GPU, where ragged heads are not: use heads='shared'")
        self.attention = attention
        self._writes = tensor_at(write_key), tensor_at(write_value)
        self._attention = tensor_at(attention)
        self._memory = [_copy_of(self._attention.src[index]) for index in (1, 2, 3)]
        self._key, self._value, self._mask = (GGMLTensor.from_buffer(memory) for memory in self._memory)
        self._own = [ctypes.addressof(memory) for memory in self._memory]
        self._attention.src[1], self._attention.src[2], self._attention.src[3] = self._own
        self._pool: weakref.ref[Pool | WindowPool] | None = None

    @property
    def are_in_graph(self) -> bool:
        """Whether llama.cpp has not made another graph in the meantime."""
        return bool(self._attention.src[1] == self._own[0])

    def point_to(self, pool: Pool | WindowPool, num_tokens: int) -> None:
        """Write the next token's key and value behind `num_tokens` others, and attend to all of them."""
        entries = zip(self._writes, (self._key, self._value), (pool.key, pool.value), strict=True)
        for write, tensor, tail in entries:
            write.data = tail.data_ptr() + num_tokens * tail.stride(2) * tail.element_size()
            tensor.ne[1] = pool.num_seen(num_tokens + 1)
        if self._pool is None or self._pool() is not pool:
            self._pool = weakref.ref(pool)  # a cache that is gone frees it
            for tensor, seen in ((self._key, pool.seen_key), (self._value, pool.seen_value), (self._mask, pool.mask)):
                tensor.data, tensor.ne[2], tensor.type = seen.data_ptr(), seen.shape[0], ggml_type_of(seen.dtype)
                tensor.nb[2], tensor.nb[1], tensor.nb[0] = (stride * seen.element_size() for stride in seen.stride())


def _copy_of(address: int) -> ctypes.Array[ctypes.c_char]:
    """The bytes of a tensor's struct, without its data."""
    size = ctypes.sizeof(GGMLTensor) + PADDING_BYTES
    return ctypes.create_string_buffer(ctypes.string_at(address, size), size)


class TokenKernel:
    """Reads single tokens into `KVCache`s.

    Args:
        source: owner of the model handle `source.model`.
        params: parameters of the context.
        model: the tested model.

    Attributes:
        on_output: called with the attention of each layer as this project computes it and as llama.cpp has, see
            `OwnAttention.on_output`. None: llama.cpp does not stop.
    """

    def __init__(self, source: Any, params: Any, model: CellModel) -> None:
        ops = ggml()[3]
        self._write, self._flash = ops["SET_ROWS"], ops["FLASH_ATTN_EXT"]
        self._shapes = model.in_order
        self._pools: list[tuple[Pool | WindowPool, int]] = []
        self._is_ready = False
        self._error: BaseException | None = None
        self.on_output: OnOutput | None = None
        self.pointer = library().ggml_backend_sched_eval_callback(self._call)
        self._context = Context(source, params, self.pointer, 1)
        self._make_context()

    def _make_context(self) -> None:
        """Make a context that has no graph, so that none is left half changed."""
        self._context.open(iter([CELLS_STEP]))
        self._nodes: list[_LayerNodes] = []
        self._new_writes: list[int] = []

    @torch.no_grad()
    def read(self, cache: KVCache, token_id: int) -> Tensor:
        """Read a token; returns its logits, (1, vocab_size) float32.

        Args:
            cache: it has read a token before.
        """
        position = cache.num_tokens
        self._pools = [
            (pooled(layer, shape.num_attention_heads), layer.length)
            if isinstance(layer, CompactableLayer)
            else window_pooled(layer)
            for layer, shape in zip(cache.with_keys, self._shapes, strict=True)
        ]
        for nodes, (pool, num_tokens) in zip(self._nodes, self._pools, strict=False):
            nodes.point_to(pool, num_tokens)
        self._is_ready, self._error = False, None
        self._context.clear()
        try:
            status = self._context.decode([token_id], position, 1)
        finally:
            pools, self._pools = self._pools, []
            if self._error is not None:
                self._make_context()
        if self._error is not None:
            raise self._error
        if status:
            raise EngineFailed(f"llama.cpp could not read a token at position {position} (status {status})")
        for layer, shape, (pool, num_tokens) in zip(cache.with_keys, self._shapes, pools, strict=True):
            if isinstance(layer, CompactableLayer):
                layer.length += 1
                layer.scaling = shape.scaling
            elif isinstance(pool, WindowPool):
                pool.hand_to(layer, num_tokens + 1)
        return self._context.logits(1)

    def _call(self, address: int, is_asking: bool, _: int) -> bool:
        """Called before each operation of a pass: a graph that is known is left alone, another one is changed."""
        if self._is_ready and self.on_output is None:
            return False
        try:
            if not is_asking:
                self._compare(address)
                return True
            if self._nodes and not self._new_writes and self._nodes[0].are_in_graph:
                self._is_ready = True
            if not self._is_ready:
                self._change(address)
        except BaseException as error:  # it cannot pass through llama.cpp: `read` raises it
            self._error, self._is_ready, self.on_output = error, True, None
        return self.on_output is not None and tensor_at(address).op == self._flash

    def _compare(self, address: int) -> None:
        assert self.on_output is not None
        (index,) = (index for index, nodes in enumerate(self._nodes) if nodes.attention == address)
        (pool, num_tokens), scaling = self._pools[index], self._shapes[index].scaling
        query = read_tensor(tensor_at(address).src[0])[None].float()
        output, _ = attend(query, *pool.exact(num_tokens + 1), pool.slots, scaling)
        self.on_output(output, output_at(address))

    def _change(self, address: int) -> None:
        """Point an operation of a new graph to this project's memory."""
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        if op == self._write:
            if not self._new_writes:
                self._nodes = []
            self._new_writes.append(address)
        elif op == self._flash:
            nodes = _LayerNodes(self._new_writes[-2], self._new_writes[-1], address)
            nodes.point_to(*self._pools[len(self._nodes)])
            self._nodes.append(nodes)
            if len(self._nodes) == len(self._pools):
                self._new_writes, self._is_ready = [], True
