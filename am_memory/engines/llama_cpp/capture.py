"""Captures queries and keys of attention while llama.cpp computes a graph. Knows no cache.

Before each operation, llama.cpp asks a callback whether it wants the result. If nothing is to be captured, the answer
is no, at no measurable cost. Otherwise the graph pauses after each attention, whose inputs are still in memory.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.engines.llama_cpp.layout import GGMLTensor
from am_memory.engines.llama_cpp.library import (
    from_rows,
    ggml,
    library,
    read_tensor,
    tensor_at,
    to_rows,
    type_name,
)
from am_memory.errors import UnsupportedModel
from am_memory.solver.block import LOG2_E

MAX_CACHED_SCORES = 2**20
"""The most attention scores in memory at once: a few MiB fit a CPU's cache."""

OP_OFFSET = GGMLTensor.op.offset


@dataclass(frozen=True)
class Attention:
    """One attention operation that has just been computed.

    Attributes:
        query: (num_attention_heads, num_tokens, head_dim) float32, after RoPE.
        key: (num_key_value_heads, num_cells, head_dim), all cells of the context.
        mask: (num_tokens, num_cells) float32, 0 or -inf.
        scaling: factor of the scores before the softmax.
        address: address of the operation's result.
        is_flash: the result is the output of flash attention; otherwise it is the attention weights.
        rounds_to: the type to which llama.cpp rounds queries before multiplying them with keys; None if it does not.
    """

    query: Tensor
    key: Tensor
    mask: Tensor
    scaling: float
    address: int
    is_flash: bool
    rounds_to: str | None = None

    @property
    def grouped_query(self) -> Tensor:
        """(num_key_value_heads, num_key_value_groups, num_tokens, head_dim)."""
        return self.query.view(self.key.shape[0], -1, *self.query.shape[1:])

    def log_mass(self) -> Tensor:
        """Log of the sum of exp(score) of each query over all cells that it sees.

        Returns:
            (num_key_value_heads, num_key_value_groups, num_tokens) float32.
        """
        num_heads, groups, num_tokens, head_dim = self.grouped_query.shape
        query = self.grouped_query.transpose(1, 2).reshape(
            num_heads, -1, head_dim
        )  # the queries of a token's group are adjacent
        key = (self.key.float() * (self.scaling * LOG2_E)).mT  # base 2 is faster, as in the solver
        mask = self.mask.repeat_interleave(groups, dim=0)
        log_mass = query.new_empty(query.shape[:2])
        step = max(MAX_CACHED_SCORES // (num_heads * key.shape[2]), 1)
        for start in range(0, query.shape[1], step):
            rows = slice(start, start + step)
            scores = torch.bmm(query[:, rows], key).add_(mask[rows])
            top = scores.amax(dim=-1, keepdim=True)
            log_mass[:, rows] = scores.sub_(top).exp2_().sum(dim=-1).log2_().add_(top[:, :, 0]) / LOG2_E
        return log_mass.view(num_heads, num_tokens, groups).transpose(1, 2)

    def actual(self) -> Tensor:
        """The operation's result: the output of flash attention, else the attention weights."""
        return read_tensor(self.address)

    def expected(self) -> Tensor:
        """The result that follows from query and key, in the shape of `actual`."""
        query = self.grouped_query
        if self.rounds_to is not None:
            query = from_rows(to_rows(query.flatten(0, 2), self.rounds_to), self.rounds_to).view(query.shape)
        weight = (query @ self.key.float().mT[:, None] * self.scaling + self.mask).softmax(dim=-1)
        if not self.is_flash:
            return weight.flatten(0, 1)  # (num_attention_heads, num_tokens, num_cells)
        value = read_tensor(tensor_at(self.address).src[2]).float()
        return (weight @ value[:, None]).flatten(0, 1).transpose(0, 1)  # (num_tokens, num_attention_heads, head_dim)


OnAttention = Callable[[int, Attention], None]
"""Called with the index of the layer among the captured layers, and its attention."""


class Capture:
    """The callback of a llama.cpp context.

    Args:
        num_layers: attention layers in each pass.

    Attributes:
        layers: numbers of the layers that are captured; all at first.
        error: the exception that `on_attention` raised; it ended the graph.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self.layers: Sequence[int] = range(num_layers)
        ops = ggml()[3]
        self._flash, self._softmax = ops["FLASH_ATTN_EXT"], ops["SOFT_MAX"]
        self._on_attention: OnAttention | None = None
        self._layer = 0
        self.error: BaseException | None = None
        self.pointer = library().ggml_backend_sched_eval_callback(self._call)

    @contextmanager
    def taking(self, on_attention: OnAttention | None) -> Iterator[None]:
        """Capture attention while the body decodes; an exception of `on_attention` ends the graph and is raised here.

        Args:
            on_attention: called with each captured attention; None captures nothing.
        """
        self._on_attention, self._layer, self.error = on_attention, 0, None
        try:
            yield
            if self.error is not None:
                raise self.error
        finally:
            self._on_attention, self.error = None, None

    def _call(self, address: int, is_asking: bool, _: int) -> bool:
        if self._on_attention is None:
            return False
        op = ctypes.c_int.from_address(address + OP_OFFSET).value
        is_attention = op in (self._flash, self._softmax)
        if is_asking or not is_attention:
            return is_attention or not is_asking
        try:
            self._take(address, is_flash=op == self._flash)
        except BaseException as error:  # it cannot pass through llama.cpp: `taking` raises it again
            self.error = error
            return False
        return True

    def _take(self, address: int, *, is_flash: bool) -> None:
        assert self._on_attention is not None
        number = self._layer % self._num_layers
        self._layer += 1
        if number in self.layers:
            self._on_attention(self.layers.index(number), attention_at(address, is_flash=is_flash))


def attention_at(address: int, *, is_flash: bool) -> Attention:
    """Read an attention; raise UnsupportedModel if its scores are more than a scaled and masked product."""
    tensor = tensor_at(address)
    scaling, max_bias, softcap = struct.unpack("<fff", bytes(tensor.op_params)[:12])
    if is_flash:
        query, key, mask, sinks = tensor.src[0], tensor.src[1], tensor.src[3], tensor.src[4]
    else:
        product = tensor_at(tensor.src[0])
        query, key, mask, sinks, softcap = product.src[1], product.src[0], tensor.src[1], tensor.src[2], 0.0
        if product.op != ggml()[3]["MUL_MAT"]:
            raise UnsupportedModel("this model changes its attention scores before the softmax: use another model")
    if max_bias or softcap or sinks or not mask or not math.isfinite(scaling):
        raise UnsupportedModel(
            f"this model's attention has more than a scale and a causal mask (ALiBi {max_bias}, softcap {softcap}, "
            f"sinks {bool(sinks)}): use another model"
        )
    seen = read_tensor(mask)[0].float()
    taken = read_tensor(query).float()
    rounds_to = "Q8_0" if type_name(tensor_at(key).type) == "q8_0" else None
    return Attention(taken, read_tensor(key), seen[: taken.shape[1]], scaling, address, is_flash, rounds_to)
