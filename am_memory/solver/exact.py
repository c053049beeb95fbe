"""Attention of the reference queries to the whole block, which a compact block has to reproduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from am_memory.solver.block import LOG2_E, Block
from am_memory.solver.triton_support import MAX_HEAD_DIM, dot_dtype, padded, runs_triton

SMALL_BLOCK_TOKENS = 200
"""In a block of this many keys, a query with the mean share counts half as much as one with the whole share."""


@dataclass(frozen=True)
class ExactAttention:
    """The block's own attention, from one pass over queries and keys (arXiv:2602.16284, section 3).

    Attributes:
        scores: (B, seq_len) float32, root mean square over the queries of the attention that each key gets.
        max_logit: (B, num_queries) float32, the largest scaled logit of each query.
        log_mass: (B, num_queries) float32, log of the sum over the keys of exp(logit).
        output: (B, num_queries, value_dim) float32, softmax(logits) V.
        weight: (B, num_queries) float32, how much each query counts in a fit; see `fit_weights`.
    """

    scores: Tensor
    max_logit: Tensor
    log_mass: Tensor
    output: Tensor
    weight: Tensor

    def head(self, index: int) -> ExactAttention:
        """One head, as views."""
        return ExactAttention(*(tensor[index, None] for tensor in self._tensors))

    def queries(self, where: Tensor) -> ExactAttention:
        """Keep the queries at these indices (int64). The scores stay those of all queries."""
        by_query = (tensor[:, where] for tensor in (self.max_logit, self.log_mass, self.output, self.weight))
        return ExactAttention(self.scores, *by_query)

    @classmethod
    def stack(cls, heads: Sequence[ExactAttention]) -> ExactAttention:
        """Join the heads of several blocks."""
        return cls(*(torch.cat(tensors) for tensors in zip(*(head._tensors for head in heads), strict=True)))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.scores, self.max_logit, self.log_mass, self.output, self.weight


def exact_attention(block: Block) -> ExactAttention:
    """Scores, mass and output of the block. Key selection and fit share the result."""
    of_all = _on_tensor_cores if can_use_tensor_cores(block) else _by_chunks
    max_logit, log_mass, output, share, energy = of_all(block)
    return ExactAttention(rms_scores(energy, block), max_logit, log_mass, output, fit_weights(share, block.num_keys))


def log_mass(block: Block) -> Tensor:
    """The log of each query's attention mass on the block, (B, num_queries) float32; the values do not matter."""
    if can_use_tensor_cores(block):
        return _masses_on_tensor_cores(_ForKernels.of(block))[1]
    mass = block.query.new_empty(block.query.shape[:2], dtype=torch.float32)
    for rows, _, total, top in unnormalised_weights(block):
        mass[:, rows] = (top + total.log2()) / LOG2_E
    return mass


def _by_chunks(block: Block) -> tuple[Tensor, ...]:
    """Largest logits, log masses, outputs and shares of the queries, and the energies of the keys.

    Returns:
        max_logit, log_mass: (B, num_queries) float32.
        output: (B, num_queries, value_dim) float32.
        share: (B, num_queries) float32, of each query's attention, on this block.
        energy: (B, 1, seq_len) float32, sum over the queries of (share * softmax weight)^2.
    """
    value = block.value.float()
    energy = value.new_zeros(block.num_heads, 1, block.seq_len)
    max_logit = value.new_empty(block.num_heads, block.num_queries)
    log_mass, share = torch.empty_like(max_logit), torch.ones_like(max_logit)
    output = value.new_empty(block.num_heads, block.num_queries, block.value_dim)
    for rows, weight, total, top in unnormalised_weights(block):
        max_logit[:, rows] = top / LOG2_E
        log_mass[:, rows] = (top + total.log2()) / LOG2_E
        torch.bmm(weight, value, out=output[:, rows]).mul_(total.reciprocal()[:, :, None])
        if block.log_mass is not None:
            share[:, rows] = (log_mass[:, rows] - block.log_mass[:, rows]).exp_()
        add_squared_weights(energy, weight, total, share[:, rows])
    return max_logit, log_mass, output, share, energy


def can_use_tensor_cores(block: Block) -> bool:
    """Whether the Triton kernels take the block.

    They would round a float32 block, and cap no logits. Their keys and values have one width.
    """
    is_16_bit = block.key.dtype in (torch.bfloat16, torch.float16)
    fits = block.value_dim == block.head_dim <= MAX_HEAD_DIM
    return is_16_bit and not block.softcap and fits and runs_triton(block.key.device)


def block_sizes(head_dim: int) -> dict[str, int]:
    """Tile sizes of the kernels, powers of two. They fit the shared memory of every GPU that `runs_triton` accepts."""
    padded_dim = padded(head_dim)
    block_queries, block_keys = (64, min(64, 2**12 // padded_dim)) if padded_dim <= 128 else (32, 16)
    return {"PADDED_DIM": padded_dim, "BLOCK_QUERIES": block_queries, "BLOCK_KEYS": block_keys}


class _ForKernels(NamedTuple):
    """A block as the kernels take it; without biases they do not read `bias`."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    scale: float
    lengths: tuple[int, int]
    options: dict[str, Any]

    @classmethod
    def of(cls, block: Block) -> _ForKernels:
        from am_memory.solver.exact_kernels import mass_kernel

        query, key, value = (tensor.contiguous() for tensor in (block.query, block.key, block.value))
        bias = key if block.key_bias is None else block.key_bias.contiguous()
        options = {
            "HAS_BIAS": block.key_bias is not None,
            "HEAD_DIM": block.head_dim,
            "DOT_DTYPE": dot_dtype(mass_kernel, key.dtype),
            **block_sizes(block.head_dim),
        }
        return cls(query, key, value, bias, block.scaling * LOG2_E, (block.num_queries, block.seq_len), options)


def _on_tensor_cores(block: Block) -> tuple[Tensor, ...]:
    """The same as `_by_chunks`, without writing attention weights to the device's memory."""
    import triton

    from am_memory.solver.exact_kernels import energy_kernel

    given = _ForKernels.of(block)
    query, key, _, bias, scale, lengths, options = given
    max_logit, log_mass, output = _masses_on_tensor_cores(given)
    energy = output.new_empty(block.num_heads, 1, block.seq_len)
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        share = torch.ones_like(log_mass) if block.log_mass is None else (log_mass - block.log_mass).exp_()
        grid = triton.cdiv(block.seq_len, options["BLOCK_KEYS"]), block.num_heads
        energy_kernel[grid](query, key, bias, log_mass, share, energy, scale, *lengths, **options)
    return max_logit, log_mass, output, share, energy


def _masses_on_tensor_cores(given: _ForKernels) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logits, log masses and outputs of the queries; see `_by_chunks`."""
    import triton

    from am_memory.solver.exact_kernels import mass_kernel

    query, key, value, bias, scale, lengths, options = given
    output = query.new_empty(query.shape, dtype=torch.float32)
    max_logit, log_mass = output.new_empty(2, *query.shape[:2]).unbind()
    with torch.cuda.device_of(key):  # type: ignore[no-untyped-call]
        grid = triton.cdiv(query.shape[1], options["BLOCK_QUERIES"]), len(query)
        mass_kernel[grid](query, key, value, bias, max_logit, log_mass, output, scale, *lengths, **options)
    return max_logit, log_mass, output


def fit_weights(share: Tensor, num_keys: Tensor) -> Tensor:
    """How much each query counts in the fits of a block.

    Queries that attend mostly to this block weigh most; short blocks relax the weighting. An error in a block reaches
    the model's output scaled by the query's share of attention on it, so in a long block the share is the weight. A
    text has many short blocks. A query attends little to most of them, but their errors add up, so there the weight
    saturates.

    Args:
        share: (B, num_queries) float32, of each query's attention, on this block.
        num_keys: (B,) int64, the number of keys of each head.

    Returns:
        (B, num_queries) float32, relative to the head's largest.
    """
    tiny = torch.finfo(torch.float32).tiny
    share = share / share.amax(1, keepdim=True).clamp_min(tiny)
    half = (num_keys[:, None] / SMALL_BLOCK_TOKENS) ** 2 * share.mean(1, keepdim=True)
    return share * (1 + half) / (share + half).clamp_min(tiny)


def unnormalised_weights(block: Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Softmax numerators over the whole block, a chunk of queries at a time.

    Yields:
        rows: the chunk of queries.
        weight: (B, chunk, seq_len) float32, 2^(logit - top); the consumer may overwrite it.
        total: (B, chunk) float32, row sums of weight, at least 1.
        top: (B, chunk) float32, largest base-2 logit of the row.
    """
    for rows, weight in block.base2_logits(block.key, block.key_bias):
        # The clamps only matter to a head whose keys are all padding: its weights become 0.
        top = weight.amax(2).clamp_min_(torch.finfo(torch.float32).min)
        weight.sub_(top[:, :, None]).exp2_()
        yield rows, weight, weight.sum(2).clamp_min_(1.0), top


def add_squared_weights(energy: Tensor, weight: Tensor, total: Tensor, share: Tensor) -> None:
    """Add each key's squared attention, share * softmax weight, to energy (B, 1, seq_len); overwrites weight."""
    energy.baddbmm_((share / total).square_()[:, None], weight.square_())


def rms_scores(energy: Tensor, block: Block) -> Tensor:
    """(B, seq_len) from the (B, 1, seq_len) sums of squared weights."""
    return (energy[:, 0] / block.num_queries).sqrt_()
