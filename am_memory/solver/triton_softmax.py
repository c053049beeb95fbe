"""A softmax that runs over blocks of keys, as a part of Triton programs; its scores are in base 2."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_keys(scores, values, mixed, top, total, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """A block of keys more: base-2 scores (rows, keys), values (keys, dim), and what has been seen so far.

    Weights are rounded to the values' dtype, and both multiplied in DOT_DTYPE.
    """
    new_top = tl.maximum(top, tl.max(scores, 1))
    # Nothing seen so far: any finite number does, as everything subtracted from is -inf.
    finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(scores - finite_top[:, None])
    kept = tl.exp2(top - finite_top)
    rounded = weight.to(values.dtype).to(DOT_DTYPE)
    mixed = tl.dot(rounded, values.to(DOT_DTYPE), mixed * kept[:, None], input_precision=PRECISION)
    return mixed, new_top, total * kept + tl.sum(weight, 1)
