"""llama.cpp's graph of a pass in which each sequence reads one token, pointed at memory of this project.

In this graph each layer writes keys and values into llama.cpp's cells, and attends to these cells. Both operations are
pointed at other memory, once for each graph; then only addresses and sizes change from pass to pass. llama.cpp does not
stop, and computes the whole pass in one go. Knows no cache.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from am_memory.engines.llama_cpp.capture import OP_OFFSET
from am_memory.engines.llama_cpp.context import CELLS_STEP, Context
from am_memory.engines.llama_cpp.layout import PADDING_BYTES, GGMLTensor
from am_memory.engines.llama_cpp.library import ggml, ggml_type_of, is_in_host_memory, library, tensor_at
from am_memory.engines.llama_cpp.source import Source
from am_memory.errors import EngineFailed, UnsupportedModel


class LayerNodes:
    """The operations of one layer in llama.cpp's graph, and the tensors that they are given, which may be changed.

    Args:
        write_key, write_value: addresses of the operations that store keys and values.
        attention: address of the attention.

    Raises:
        UnsupportedModel: they do not lie in host memory.
    """

    def __init__(self, write_key: int, write_value: int, attention: int) -> None:
        if not all(map(is_in_host_memory, (write_key, write_value, attention))):
            raise UnsupportedModel("llama.cpp attends on a GPU, where ragged heads are not: use heads='shared'")
        self.writes = tensor_at(write_key), tensor_at(write_value)
        self.attention, self.attention_address = tensor_at(attention), attention
        self._memory: weakref.ref[object] | None = None  # a cache that is gone frees it
        self.query_address = int(self.attention.src[0])
        self.key, self.value, self.mask = (own_source(self.attention, index) for index in (1, 2, 3))

    @property
    def are_in_graph(self) -> bool:
        """Whether llama.cpp has not made another graph in the meantime."""
        return bool(self.attention.src[1] == ctypes.addressof(self.key))

    def attend_to(self, memory: object, seen: Sequence[Tensor]) -> None:
        """Attend to other keys, values and masks.

        Args:
            memory: owner of these tensors; nothing is done if it is that of the last call.
            seen: (num_heads, num_rows, width) each.
        """
        if self._memory is not None and self._memory() is memory:
            return
        self._memory = None
        for tensor, rows in zip((self.key, self.value, self.mask), seen, strict=True):
            tensor.data, tensor.ne[2], tensor.type = rows.data_ptr(), rows.shape[0], ggml_type_of(rows.dtype)
            tensor.nb[2], tensor.nb[1], tensor.nb[0] = (stride * rows.element_size() for stride in rows.stride())
        self._memory = weakref.ref(memory)


def own_source(node: GGMLTensor, index: int) -> GGMLTensor:
    """Give an operation a copy of one of its sources, without the data; returns the copy, which must be kept."""
    size = ctypes.sizeof(GGMLTensor) + PADDING_BYTES
    copy = ctypes.create_string_buffer(ctypes.string_at(node.src[index], size), size)
    node.src[index] = ctypes.addressof(copy)
    return GGMLTensor.from_buffer(copy)


class PointedGraph:
    """A context that reads one token of each of some sequences, over memory of this project.

    Args:
        source: owner of the model.
        params: parameters of the context.
        num_layers: layers of attention.
        num_sequences: the most tokens of a pass.
        point: called with the nodes of each layer and its number, to point them to the memory of a pass.
    """

    def __init__(
        self, source: Source, params: Any, num_layers: int, num_sequences: int, point: Callable[[LayerNodes, int], None]
    ) -> None:
        ops = ggml()[3]
        self._write, self._flash = ops["SET_ROWS"], ops["FLASH_ATTN_EXT"]
        self._num_layers, self._point = num_layers, point
        self._is_ready = False
        self._error: BaseException | None = None
        self._stop: Callable[[int], None] | None = None
        self._pointer = library().ggml_backend_sched_eval_callback(self._call)
        self.num_sequences = num_sequences
        self._context = Context(source, params, self._pointer, num_sequences, num_sequences)
        self._make_context()

    def _make_context(self) -> None:
        """Make a context that has no graph, so that none is left half changed."""
        self._context.open(iter([CELLS_STEP]))
        self.nodes: list[LayerNodes] = []
        self._new_writes: list[int] = []

    def compute(
        self, token_ids: Sequence[int], positions: Sequence[int], stop: Callable[[int], None] | None = None
    ) -> Tensor:
        """Read token i at position i, each in a sequence of its own; returns logits, (num_tokens, vocab_size) float32.

        Args:
            stop: called with the number of each layer, behind its attention. None: llama.cpp does not stop.
        """
        self._context.clear()
        for index, nodes in enumerate(self.nodes):
            self._point(nodes, index)
        self._is_ready, self._error, self._stop = False, None, stop
        try:
            status = self._context.decode_side_by_side(token_ids, positions)
        finally:
            self._stop = None
            if self._error is not None:
                self._make_context()
        if self._error is not None:
            raise self._error
        if status:
            where = ", ".join(map(str, positions))
            raise EngineFailed(f"llama.cpp could not read a token at position {where} (status {status})")
        return self._context.logits(len(token_ids))

    def _call(self, address: int, is_asking: bool, _: int) -> bool:
        """Called before each operation of a pass: a graph that is known is left alone, another one is changed."""
        if self._is_ready and self._stop is None:
            return False
        try:
            if not is_asking:
                self._stop_at(address)
                return True
            if self.nodes and not self._new_writes and self.nodes[0].are_in_graph:
                self._is_ready = True
            if not self._is_ready:
                self._change(address)
        except BaseException as error:  # it cannot pass through llama.cpp: `compute` raises it
            self._error, self._is_ready, self._stop = error, True, None
        return self._stop is not None and tensor_at(address).op == self._flash

    def _stop_at(self, address: int) -> None:
        assert self._stop is not None
        (index,) = (index for index, nodes in enumerate(self.nodes) if nodes.attention_address == address)
        self._stop(index)

    def _change(self, address: int) -> None:
        """Point an operation of a new graph to this project's memory."""
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        if op == self._write:
            if not self._new_writes:
                self.nodes = []
            self._new_writes.append(address)
        elif op == self._flash:
            nodes = LayerNodes(self._new_writes[-2], self._new_writes[-1], address)
            self._point(nodes, len(self.nodes))
            self.nodes.append(nodes)
            if len(self.nodes) == self._num_layers:
                self._new_writes, self._is_ready = [], True
