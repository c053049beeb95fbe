"""The online softmax of Triton kernels: attention over one tile of keys after another, with base-2 logits."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from am_memory.solver import block

LOG2_E = tl.constexpr(block.LOG2_E)


@triton.jit
def add_keys(scores, values, mixed, top, total, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Add a tile of keys to a running softmax.

    Args:
        scores: (rows, keys), base-2 logits.
        values: (keys, dim).
        mixed: (rows, dim), weighted sum of the values so far.
        top, total: (rows,), largest logit and sum of the weights so far.
        DOT_DTYPE: weights are rounded to the values' dtype, and both are multiplied in this one.

    Returns:
        mixed, top, total with the tile.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # With no key so far, top is -inf; any finite number serves, because all scores are -inf too.
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(scores - finite_top[:, None])
    kept = tl.exp2(top - finite_top)
    rounded = weight.to(values.dtype).to(DOT_DTYPE)
    mixed = tl.dot(rounded, values.to(DOT_DTYPE), mixed * kept[:, None], input_precision=PRECISION)
    return mixed, new_top, total * kept + tl.sum(weight, 1)
