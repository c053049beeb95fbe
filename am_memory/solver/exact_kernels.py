"""Two Triton kernels for a block's exact attention in 16 bits: masses and outputs, then the energies of the keys.

`exact.py` launches them and has the definition. No attention weight leaves the chip. Products of queries and keys are
exact, because tensor cores accumulate in float32. Weights enter the outputs in TF32 (10 bits of mantissa), which is
more than a model's own attention has.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from am_memory.solver.triton_softmax import LOG2_E, add_keys


@triton.jit
def _base2_logits(queries, keys, key_bias, where, is_key, scale, HAS_BIAS: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """Logits of a tile of queries (rows, dim) on a tile of keys (dim, columns); -inf where there is no key."""
    logits = tl.dot(queries.to(DOT_DTYPE), keys.to(DOT_DTYPE), input_precision="ieee") * scale
    if HAS_BIAS:
        logits += tl.load(key_bias + where, mask=is_key, other=0.0).to(tl.float32)[None] * LOG2_E
    return tl.where(is_key[None], logits, float("-inf"))


@triton.jit(do_not_specialize=["num_queries", "seq_len"])
def mass_kernel(  # noqa: PLR0913, PLR0917
    query,  # (B, num_queries, HEAD_DIM)
    key,  # (B, seq_len, HEAD_DIM), as is `value`
    value,
    key_bias,  # (B, seq_len); only with HAS_BIAS
    max_logit,  # (B, num_queries) float32, as is `log_mass`
    log_mass,
    output,  # (B, num_queries, HEAD_DIM) float32
    scale,  # of the logits, times log2(e)
    num_queries,
    seq_len,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """A tile of queries over all keys; grid (tiles of queries, B)."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    dim, column = tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_KEYS)
    is_row, is_dim = row < num_queries, dim < HEAD_DIM
    query_at = (head * num_queries + row)[:, None] * HEAD_DIM + dim[None]
    is_query = is_row[:, None] & is_dim[None]
    queries = tl.load(query + query_at, mask=is_query, other=0.0)

    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    mixed = tl.zeros([BLOCK_QUERIES, PADDED_DIM], tl.float32)
    for start in range(0, seq_len, BLOCK_KEYS):
        is_key = start + column < seq_len
        where = head * seq_len + start + column
        is_entry = is_key[None] & is_dim[:, None]
        keys = tl.load(key + where[None] * HEAD_DIM + dim[:, None], mask=is_entry, other=0.0)
        values = tl.load(value + where[:, None] * HEAD_DIM + dim[None], mask=is_key[:, None] & is_dim[None], other=0.0)
        logits = _base2_logits(queries, keys, key_bias, where, is_key, scale, HAS_BIAS, DOT_DTYPE)
        mixed, top, total = add_keys(logits, values.to(tl.float32), mixed, top, total, tl.float32, "tf32")
    # The bounds only matter to a head whose keys are all padding: its outputs become 0.
    top, total = tl.maximum(top, -3.4028234663852886e38), tl.maximum(total, 1.0)
    mass_at = head * num_queries + row
    tl.store(max_logit + mass_at, top / LOG2_E, mask=is_row)
    tl.store(log_mass + mass_at, (top + tl.log2(total)) / LOG2_E, mask=is_row)
    tl.store(output + query_at, mixed / total[:, None], mask=is_query)


@triton.jit(do_not_specialize=["num_queries", "seq_len"])
def energy_kernel(  # noqa: PLR0913, PLR0917
    query,  # (B, num_queries, HEAD_DIM)
    key,  # (B, seq_len, HEAD_DIM)
    key_bias,  # (B, seq_len); only with HAS_BIAS
    log_mass,  # (B, num_queries) float32, as is `share`
    share,
    energy,  # (B, seq_len) float32
    scale,
    num_queries,
    seq_len,
    HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Sum over the queries of (share * softmax weight)^2, for a tile of keys; grid (tiles of keys, B)."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    dim, line = tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_QUERIES)
    is_key, is_dim = column < seq_len, dim < HEAD_DIM
    where = head * seq_len + column
    keys = tl.load(key + where[None] * HEAD_DIM + dim[:, None], mask=is_key[None] & is_dim[:, None], other=0.0)
    energies = tl.zeros([BLOCK_KEYS], tl.float32)
    for start in range(0, num_queries, BLOCK_QUERIES):
        is_row = start + line < num_queries
        row = head * num_queries + start + line
        queries = tl.load(query + row[:, None] * HEAD_DIM + dim[None], mask=is_row[:, None] & is_dim[None], other=0.0)
        mass = tl.load(log_mass + row, mask=is_row, other=0.0) * LOG2_E
        counts = tl.load(share + row, mask=is_row, other=0.0)
        logits = _base2_logits(queries, keys, key_bias, where, is_key, scale, HAS_BIAS, DOT_DTYPE)
        weight = tl.exp2(logits - mass[:, None]) * counts[:, None]
        energies += tl.sum(weight * weight, 0)
    tl.store(energy + where, energies, mask=is_key)
