"""The fit of a compact block: first the biases of the kept keys, then their values (arXiv:2602.16284, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from am_memory.solver.bias import solve_bias
from am_memory.solver.block import Block, slot_mask
from am_memory.solver.exact import ExactAttention, exact_attention
from am_memory.solver.fold import cannot_fold, fold
from am_memory.solver.options import DEFAULT_OPTIONS, FitOptions
from am_memory.solver.values import compact_attention, solve_values


@dataclass(frozen=True)
class Fit:
    """A compact block, and how well it reproduces the exact one on the reference queries.

    Attributes:
        key: (B, t, head_dim) float32, the kept keys, with their biases if these are folded; 0 in padding slots.
        bias: (B, t) float32, added to the scaled logits; -inf in padding slots.
        value: (B, t, value_dim) float32; 0 in padding slots.
        mass_error: (B,) float32, RMS over queries of (compact mass / exact mass - 1).
        output_error: (B,) float32, RMS(compact output - exact output) / RMS(exact output).
        fold_error: (B,) float32, relative error of the biases that were folded into the keys. None: not folded.
    """

    key: Tensor
    bias: Tensor
    value: Tensor
    mass_error: Tensor
    output_error: Tensor
    fold_error: Tensor | None = None

    @property
    def num_unbiased_heads(self) -> int:
        """Heads whose biases were to be folded into their keys, but cannot be."""
        return 0 if self.fold_error is None else int(cannot_fold(self.fold_error).sum())


def output_error(block: Block, compact: Fit, exact: ExactAttention) -> Tensor:
    """(B,) float32: `Fit.output_error` on the queries of `block`, which may differ from those of the fit."""
    missing = compact_attention(block, compact.key, compact.bias, compact.value, exact).missing_energy
    return _relative(missing, exact)


def _relative(missing_energy: Tensor, exact: ExactAttention) -> Tensor:
    """(B,) float32: the root of an error's energy, relative to the exact output."""
    counted = exact.output * exact.weight[:, :, None]
    energy = counted.square().sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
    return (missing_energy / energy).sqrt().float()


def fit(
    block: Block,
    indices: Tensor,
    num_slots: Tensor,
    options: FitOptions = DEFAULT_OPTIONS,
    *,
    rotations: Tensor | None = None,
    exact: ExactAttention | None = None,
) -> Fit:
    """Fit the biases to the block's attention mass, then the values to its attention output.

    Args:
        block: the exact block.
        indices: (B, t) int64, the kept keys of each head, as a `KeySelection` returns them; padding is not read.
        num_slots: (B,) int64, how many of the t slots each head has.
        rotations: (B, num_distances, head_dim, head_dim), matrices that turn a query to later positions, for a cache
            that has no room for biases: each bias is folded into its key so that it holds at these positions too. The
            values are then fitted to the attention on the folded keys. None: the cache has room for biases.
        exact: `exact_attention(block)`, if it is at hand; passing it halves the work.

    Raises:
        InvalidInput: queries or keys that are not finite.
        CompactionFailed: the biases cannot be solved to optimality.
    """
    exact = exact or exact_attention(block)
    is_slot = slot_mask(num_slots, indices.shape[1])
    # Padding repeats the block's first key, so that it stays finite; the solvers leave it out.
    index = torch.where(is_slot, indices, 0)[:, :, None]
    key, value = (
        entries.gather(1, index.expand(-1, -1, entries.shape[2])).float() for entries in (block.key, block.value)
    )
    # Keys that are compact slots have a bias already; the fitted one is added to it.
    inherited = torch.where(is_slot, 0.0, -torch.inf)
    if block.key_bias is not None:
        inherited = inherited + block.key_bias.gather(1, index[:, :, 0])
    bias = inherited
    if options.fit_bias:
        bias = inherited + solve_bias(block, key, inherited, exact, options)
    fold_error = None
    if rotations is not None:
        key, bias, fold_error = fold(block, key, bias, exact.weight, rotations)
    attention = compact_attention(block, key, bias, value, exact)
    left = attention.missing_energy
    if options.fit_values:
        change, left = solve_values(attention, is_slot, options.ridge)
        value = value + change.float()
    return Fit(
        torch.where(is_slot[:, :, None], key, 0.0),
        bias,
        torch.where(is_slot[:, :, None], value, 0.0),
        attention.mass_error,
        _relative(left, exact),
        fold_error,
    )
