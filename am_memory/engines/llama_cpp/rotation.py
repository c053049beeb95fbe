"""How queries turn as a text goes on (RoPE), measured: one token is read alone, at several positions.

Alone, a token attends to itself, whatever its position: it leaves the same hidden states, and its queries differ by the
turn alone, at every layer. So nothing has to be known of a model's frequencies, their scaling or their factors, and
layers that do not turn their queries come out as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from am_memory.engines.llama_cpp.capture import Attention
from am_memory.engines.llama_cpp.decoder import CellSequence, Decoder
from am_memory.engines.llama_cpp.library import library
from am_memory.engines.llama_cpp.support import meta
from am_memory.errors import UnsupportedModel

LADDER = tuple(2**exponent for exponent in range(13))
"""Distances at which the turn is measured: any other is made of them."""
DISTANCES = (0, *LADDER[5:])
"""Tokens that a query may be later than those that a compaction is fitted to; what holds at these holds between."""
QUERY_TOLERANCE = 2e-2
"""Of what a turned query is off, relative to it."""


@dataclass(frozen=True)
class MeasuredRotation:
    """How queries and keys of one layer turn.

    Attributes:
        steps: (len(LADDER), head_dim, head_dim) float32, what turns a query to each distance, multiplied from the left.
    """

    steps: Tensor

    def by(self, distance: int) -> Tensor:
        """(head_dim, head_dim) float32: what turns a query or a key to a position that is so much later."""
        *steps, longest = self.steps.double()
        times, rest = divmod(distance, LADDER[-1])
        turn: Tensor = torch.linalg.matrix_power(longest, times)
        for exponent, step in enumerate(steps):
            if rest >> exponent & 1:
                turn = step @ turn
        return turn.float()

    @cached_property
    def later(self) -> Tensor:
        """(len(DISTANCES), head_dim, head_dim) float32, for each of `DISTANCES`."""
        return torch.stack([self.by(distance) for distance in DISTANCES])


def measured_rotations(decoder: Decoder, model: Any, token_id: int) -> list[MeasuredRotation]:
    """How the queries of each layer turn.

    Args:
        model: llama.cpp's.
        token_id: any ordinary one.

    Raises:
        UnsupportedModel: queries change with their position in another way.
    """
    start = _queries(decoder, token_id, 0)
    by_distance = [_queries(decoder, token_id, distance) for distance in LADDER]
    rotations = []
    for layer, base in enumerate(start):
        turned = [queries[layer] for queries in by_distance]
        pairs = _pairs(model, base.shape[-1])
        errors = []
        for basis in _bases(base.shape[-1]):
            error, steps = _steps(base, turned, pairs, basis)
            errors.append(error)
            if error <= QUERY_TOLERANCE:
                rotations.append(MeasuredRotation(steps))
                break
        else:
            raise UnsupportedModel(
                f"queries of layer {layer} change with their position by more than a turn (off by {min(errors):.2g}): "
                "use a model with rotary positions, or engine='transformers'"
            )
    return rotations


def _steps(base: Tensor, turned: list[Tensor], pairs: tuple[Tensor, Tensor], basis: Tensor) -> tuple[float, Tensor]:
    """If pairs turn in this basis: by how much that is off at most, relative to a query, and the turns."""
    steps = torch.stack([basis @ _rotation(base @ basis, each @ basis, *pairs) @ basis for each in turned])
    errors = [
        float((base @ turn.mT - each).norm() / each.norm().clamp_min(1e-12))
        for turn, each in zip(steps, turned, strict=True)
    ]
    return max(errors), steps


def _bases(head_dim: int) -> Iterator[Tensor]:
    """What llama.cpp may have multiplied queries and keys by: nothing, or, where keys are kept in few bits, a Hadamard
    matrix for each block of some of their elements, which is its own inverse."""
    yield torch.eye(head_dim)
    hadamard, size = torch.ones(1, 1), 1
    while head_dim % (2 * size) == 0:
        hadamard, size = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]), 2 * size
        yield torch.block_diag(*[hadamard / size**0.5] * (head_dim // size))  # type: ignore[no-untyped-call]


def _queries(decoder: Decoder, token_id: int, position: int) -> list[Tensor]:
    """Of a token that stands alone at this position, of each layer: (num_attention_heads, head_dim)."""
    queries: list[Tensor] = []

    def take(_: int, attention: Attention) -> None:
        queries.append(attention.query[:, 0].clone())

    decoder.read(CellSequence(), [token_id], position, 0, 0, take)
    return queries


def _pairs(model: Any, head_dim: int) -> tuple[Tensor, Tensor]:
    """Which elements of a query turn together: neighbours, or those of two halves."""
    lib = library()
    kind = lib.llama_model_rope_type(model)
    if kind == lib.LLAMA_ROPE_TYPE_NONE:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    size = int(meta(model, f"{meta(model, 'general.architecture')}.rope.dimension_count") or head_dim)
    index = torch.arange(size)
    return (index[: size // 2], index[size // 2 :]) if kind == lib.LLAMA_ROPE_TYPE_NEOX else (index[::2], index[1::2])


def _rotation(query: Tensor, turned: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The turn of each pair that brings the query, in all heads together, nearest to the other."""
    before, after = (torch.complex(each[:, first], each[:, second]) for each in (query, turned))
    angle = (before.conj() * after).sum(0).angle()
    rotation = torch.eye(query.shape[-1])
    rotation[first, first] = rotation[second, second] = angle.cos()
    rotation[first, second], rotation[second, first] = -angle.sin(), angle.sin()
    return rotation
