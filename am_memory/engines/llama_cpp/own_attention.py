"""Computes attention in place of llama.cpp, layer by layer, over a cache of this project.

llama.cpp computes a batch's queries, keys and values. At each attention it stops: the keys and values of the batch are
appended to the cache, this project computes the attention over the cache, and llama.cpp goes on with its output. So
every head may have slots and biases of its own, with the code of the transformers engine. Knows no context.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from am_memory.engines import partwise
from am_memory.engines.branches import BranchLayer
from am_memory.engines.llama_cpp.capture import OP_OFFSET
from am_memory.engines.llama_cpp.library import ggml, library, read_tensor, tensor_at, write_tensor
from am_memory.errors import EngineFailed
from am_memory.kv_cache.int8 import decoded
from am_memory.kv_cache.layers import CompactableLayer, SlidingLayer, TailBuffer, TailState
from am_memory.kv_cache.slots import Slots

OnOutput = Callable[[Tensor, Tensor], None]
Layer: TypeAlias = CompactableLayer | SlidingLayer | BranchLayer


class OwnAttention:
    """The callback of a llama.cpp context with flash attention, whose cells hold the tokens of one batch alone.

    Attributes:
        pointer: for the context's parameters.
        error: the exception that was raised within the callback; it ended the graph.
        on_output: called with each layer's output and that of llama.cpp, (1, num_attention_heads, num_tokens, head_dim)
            each, for the first batch of a cache; llama.cpp computes its own, too. None: it computes none.
    """

    def __init__(self) -> None:
        ops = ggml()[3]
        self._flash, self._none = ops["FLASH_ATTN_EXT"], ops["NONE"]
        self._layers: Iterator[Layer] | None = None
        self.error: BaseException | None = None
        self.on_output: OnOutput | None = None
        self.pointer = library().ggml_backend_sched_eval_callback(self._call)

    @contextmanager
    def over(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Attend over these layers while the body decodes; an exception ends the graph and is raised here."""
        self._layers, self.error = iter(layers), None
        try:
            yield
            if self.error is not None:
                raise self.error
            if next(self._layers, None) is not None:
                raise EngineFailed("a signal handler raised an error while llama.cpp read tokens: read them again")
        finally:
            self._layers = self.error = None

    def _call(self, address: int, is_asking: bool, _: int) -> bool:
        if self._layers is None:
            return False
        op = ctypes.c_int.from_address(address + OP_OFFSET)
        if is_asking:
            if op.value != self._flash:
                return False
            if self.on_output is None:
                op.value = self._none  # llama.cpp computes nothing here
            return True
        op.value = self._flash
        try:
            with torch.no_grad():
                layer = next(self._layers)
                is_first = layer.get_seq_length() == 0  # llama.cpp has this batch alone
                output = _attended(address, layer)
            if self.on_output is not None and is_first:
                self.on_output(output, output_at(address))
            write_tensor(address, output[0].transpose(0, 1))
        except BaseException as error:  # it cannot pass through llama.cpp: `over` raises it again
            self.error = error
            return False
        return True


def output_at(address: int) -> Tensor:
    """The result of llama.cpp's flash attention, (1, num_attention_heads, num_tokens, head_dim) float32."""
    return read_tensor(address).transpose(0, 1)[None]


def _attended(address: int, layer: Layer) -> Tensor:
    """Append a batch's keys and values to a layer; returns its attention, in the shape of `output_at`."""
    node = tensor_at(address)
    query = read_tensor(node.src[0])[None].float()
    num_tokens = query.shape[2]
    key, value = (read_tensor(_as_stored(node.src[index]))[None, :, :num_tokens] for index in (1, 2))
    (scaling,) = struct.unpack("<f", bytes(node.op_params)[:4])
    if isinstance(layer, BranchLayer):  # the tokens of the batch are of as many texts
        layer.update(key.float().transpose(0, 2), value.float().transpose(0, 2))
        return layer.attend(query.transpose(0, 2), scaling)[0].transpose(0, 2)
    keys, values = layer.update(key, value)
    if isinstance(layer, SlidingLayer):
        return _within_window(query, keys, values, layer.sliding_window, scaling)
    return _of_layer(query, layer, scaling)


def _as_stored(address: int) -> int:
    """The keys or values that a cache stores: flash attention takes float32 through a cast to float16."""
    tensor = tensor_at(address)
    return int(tensor.src[0]) if tensor.op == ggml()[3]["CPY"] else address


def _of_layer(query: Tensor, layer: CompactableLayer, scaling: float) -> Tensor:
    """Attention over a layer's slots and tail, after which the layer's sink has its queries."""
    layer.scaling, slots = scaling, layer.slots
    output, log_mass = attend(query, *layer.tail, slots, scaling)
    if layer.query_sink is not None:
        grouped = layer.num_heads, -1, query.shape[2]
        layer.query_sink(query.reshape(*grouped, query.shape[3]), log_mass.reshape(grouped))
        if layer.slots is not slots:  # compacted by these very queries
            output, _ = attend(query, *layer.tail, layer.slots, scaling)
    return output


def attend(query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float) -> tuple[Tensor, Tensor]:
    """`partwise.attend` in float32, which is faster than float16 on a CPU."""
    return partwise.attend(query, key.float(), value.float(), _in_float32(slots), scaling)


def in_float32(layer: CompactableLayer) -> CompactableLayer:
    """A copy of a layer in float32, for reading only."""
    copied, (key, value) = CompactableLayer(), layer.tail
    copied.restore(
        TailState(_in_float32(layer.slots), TailBuffer(key.float(), value.float()), layer.start, layer.length)
    )
    return copied


def _in_float32(slots: Slots | None) -> Slots | None:
    if slots is None:
        return None
    return replace(slots, key=decoded(slots.key).float(), value=decoded(slots.value).float(), bias=slots.bias.float())


def _within_window(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> Tensor:
    """Causal attention to the last `window` tokens, in float32: (1, num_attention_heads, num_tokens, head_dim)."""
    num_tokens, num_keys = query.shape[2], key.shape[2]
    distance = torch.arange(num_keys - num_tokens, num_keys)[:, None] - torch.arange(num_keys)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key.float(),
        value.float(),
        attn_mask=(distance >= 0) & (distance < window),
        scale=scaling,
        enable_gqa=True,
    )
