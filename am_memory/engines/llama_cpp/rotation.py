"""Measures the RoPE of each layer: a single token is read at several positions.

A token that is alone attends only to itself, so its hidden states do not depend on its position. Its queries therefore
differ by the rotation alone, in every layer. Nothing has to be known about the model's frequencies or their scaling,
and layers without RoPE are recognised.
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
from am_memory.kv_cache.rotation import Rotation

LADDER = tuple(2**exponent for exponent in range(13))
"""Distances at which rotations are measured; all others are products of these."""
DISTANCES = (0, *LADDER[5:])
"""Distances of later queries for which biases are folded into keys; what works at these works in between."""
QUERY_TOLERANCE = 2e-2
"""Largest relative error of a rotated query."""


@dataclass(frozen=True)
class MeasuredRotation:
    """The RoPE of one layer's queries and keys.

    Attributes:
        steps: (len(LADDER), head_dim, head_dim) float32: the rotation to each distance, to be multiplied from the left.
        first, second: (num_pairs,) int64, the two elements of each pair that rotates, unless keys are quantised.
    """

    steps: Tensor
    first: Tensor
    second: Tensor

    @property
    def pairs(self) -> Rotation:
        """The same RoPE by the speed of each pair; not for quantised keys."""
        angles = torch.atan2(self.steps[:, self.second, self.first], self.steps[:, self.first, self.first]).double()
        speeds = angles[0]
        for distance, angle in zip(
            LADDER[1:], angles[1:], strict=True
        ):  # each distance says more of the speed's digits
            turns = ((speeds * distance - angle) / (2 * torch.pi)).round()
            speeds = (angle + 2 * torch.pi * turns) / distance
        return Rotation(self.first, self.second, speeds)

    def by(self, distance: int) -> Tensor:
        """The rotation of a query or key to `distance` positions later, (head_dim, head_dim) float32."""
        *steps, longest = self.steps.double()
        times, rest = divmod(distance, LADDER[-1])
        turn: Tensor = torch.linalg.matrix_power(longest, times)
        for exponent, step in enumerate(steps):
            if rest >> exponent & 1:
                turn = step @ turn
        return turn.float()

    def rotated(self, key: Tensor, distance: Tensor) -> Tensor:
        """Keys at later positions, each at its own distance.

        Args:
            key: (num_heads, num_keys, head_dim).
            distance: (num_keys,) int64 in host memory, in positions.
        """
        times = distance.div(LADDER[-1], rounding_mode="floor")
        turned = key.float()
        for count in set(times.tolist()) - {0}:
            turn = self.by(count * LADDER[-1])
            turned = torch.where((times == count)[:, None], turned @ turn.mT, turned)
        rest = distance - times * LADDER[-1]
        for exponent, step in enumerate(self.steps[:-1]):
            turned = torch.where((rest >> exponent & 1).bool()[:, None], turned @ step.mT, turned)
        return turned.to(key.dtype)

    @cached_property
    def later(self) -> Tensor:
        """The rotations to each of `DISTANCES`, (len(DISTANCES), head_dim, head_dim) float32."""
        return torch.stack([self.by(distance) for distance in DISTANCES])


def measured_rotations(decoder: Decoder, model: Any, token_id: int) -> list[MeasuredRotation]:
    """The RoPE of each layer.

    Args:
        model: the model of llama.cpp.
        token_id: any ordinary token.

    Raises:
        UnsupportedModel: queries change with their position by more than a rotation.
    """
    start = _queries(decoder, token_id, 0)
    by_distance = [_queries(decoder, token_id, distance) for distance in LADDER]
    rotations = []
    for layer, base in enumerate(start):
        rotated = [queries[layer] for queries in by_distance]
        pairs = _pairs(model, base.shape[-1])
        errors = []
        for basis in _bases(base.shape[-1]):
            error, steps = _steps(base, rotated, pairs, basis)
            errors.append(error)
            if error <= QUERY_TOLERANCE:
                rotations.append(MeasuredRotation(steps, *pairs))
                break
        else:
            raise UnsupportedModel(
                f"queries of layer {layer} change with their position by more than a turn (off by {min(errors):.2g}): "
                "use a model with rotary positions, or engine='transformers'"
            )
    return rotations


def _steps(base: Tensor, rotated: list[Tensor], pairs: tuple[Tensor, Tensor], basis: Tensor) -> tuple[float, Tensor]:
    """The largest relative error if pairs rotate in this basis, and the rotations."""
    steps = torch.stack([basis @ _rotation(base @ basis, query @ basis, *pairs) @ basis for query in rotated])
    errors = [
        float((base @ step.mT - query).norm() / query.norm().clamp_min(1e-12))
        for step, query in zip(steps, rotated, strict=True)
    ]
    return max(errors), steps


def _bases(head_dim: int) -> Iterator[Tensor]:
    """The matrices that llama.cpp may have multiplied queries and keys by: the identity, or, for quantised keys, a
    Hadamard matrix for each block of elements, which is its own inverse."""
    yield torch.eye(head_dim)
    hadamard, size = torch.ones(1, 1), 1
    while head_dim % (2 * size) == 0:
        hadamard, size = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]), 2 * size
        yield torch.block_diag(*[hadamard / size**0.5] * (head_dim // size))  # type: ignore[no-untyped-call]


def _queries(decoder: Decoder, token_id: int, position: int) -> list[Tensor]:
    """The queries of a single token at this position, one (num_attention_heads, head_dim) tensor for each layer."""
    queries: list[Tensor] = []

    def take(_: int, attention: Attention) -> None:
        queries.append(attention.query[:, 0].clone())

    decoder.read(CellSequence(), [token_id], position, 0, 0, take)
    return queries


def _pairs(model: Any, head_dim: int) -> tuple[Tensor, Tensor]:
    """The pairs of elements that rotate together: neighbours, or elements of two halves."""
    lib = library()
    kind = lib.llama_model_rope_type(model)
    if kind == lib.LLAMA_ROPE_TYPE_NONE:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    size = int(meta(model, f"{meta(model, 'general.architecture')}.rope.dimension_count") or head_dim)
    index = torch.arange(size)
    return (index[: size // 2], index[size // 2 :]) if kind == lib.LLAMA_ROPE_TYPE_NEOX else (index[::2], index[1::2])


def _rotation(query: Tensor, rotated: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The rotation of each pair that brings the queries of all heads nearest to the other ones."""
    before, after = (torch.complex(rows[:, first], rows[:, second]) for rows in (query, rotated))
    angle = (before.conj() * after).sum(0).angle()
    rotation = torch.eye(query.shape[-1])
    rotation[first, first] = rotation[second, second] = angle.cos()
    rotation[first, second], rotation[second, first] = -angle.sin(), angle.sin()
    return rotation
