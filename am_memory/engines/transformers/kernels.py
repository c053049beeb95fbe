"""Two Triton programs: attention over a part of each head's keys, and the merge of the parts.

`fused.py` launches them and knows the shapes. A head's keys are its ragged slots, with a bias each, and then its exact
tail. Scores are kept in base 2, as flash-attention kernels do: the GPU's own exponential is that of 2.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from am_memory.solver.triton_softmax import LOG2_E, add_keys


@triton.jit(do_not_specialize=["num_tokens", "tail_tokens", "num_slot_parts", "keys_per_part"])
def attend_kernel(  # noqa: PLR0913, PLR0917  Triton takes pointers, sizes and strides one by one
    query,  # (num_key_value_heads * GROUPS, num_tokens, HEAD_DIM)
    key, value,  # (num_key_value_heads, tail_tokens, HEAD_DIM): the tail, the new tokens last
    slot_key, slot_value,  # (total_slots, HEAD_DIM); with HAS_CODES only the slots that are not in int8
    key_codes, value_codes,  # (num_coded, HEAD_DIM) int8: the other slots
    key_scale, value_scale,  # (num_groups, HEAD_DIM) float32
    slot_group,  # (total_slots,) int32: the group whose scale a slot's codes have; negative: it is not in int8
    slot_row,  # (total_slots,) int32: the slot's row among the codes, or among the slots that are not in int8
    slot_bias, cu_slots,  # (total_slots,); (num_key_value_heads + 1,) int32
    write_position,  # (1,) int64, with HAS_WRITE_POSITION: where in the tail the new tokens begin; later keys are spare
    output,  # (num_parts, num_tokens, num_key_value_heads * GROUPS, HEAD_DIM)
    log_mass,  # (num_parts, num_key_value_heads * GROUPS, num_tokens) float32
    scaling, num_tokens, tail_tokens, num_slot_parts, keys_per_part,
    query_head_stride, query_token_stride, tail_head_stride, tail_token_stride,
    HAS_SLOTS: tl.constexpr, HAS_CODES: tl.constexpr, HAS_WRITE_POSITION: tl.constexpr, GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """One part of one KV head's keys, seen by a block of its group's queries; grid (parts, heads, blocks of rows).

    Part p is slots [p, p + 1) * keys_per_part of the head, and the same of the tail behind `num_slot_parts` parts.
    A row is a query: a token's whole group, then the next token's. Its output is normalised within the part; where the
    part has no key for it, its log mass is -inf and its output is not written.
    """
    part, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUPS
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token, query_head = row // GROUPS, head * GROUPS + row % GROUPS
    is_row = token < num_tokens
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query_at = query_head.to(tl.int64) * query_head_stride + token.to(tl.int64) * query_token_stride
    queries = tl.load(query + query_at[:, None] + dim[None], mask=is_row[:, None] & is_dim[None], other=0.0)
    queries = queries.to(DOT_DTYPE)
    scale = scaling * LOG2_E
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, PADDED_DIM], tl.float32)

    if HAS_SLOTS:
        begin = tl.load(cu_slots + head) + part * keys_per_part
        end = tl.minimum(tl.load(cu_slots + head + 1), begin + keys_per_part)
        mixed, top, total = _see_slots(
            queries, scale, begin, end, slot_key, slot_value, key_codes, value_codes, key_scale, value_scale,
            slot_group, slot_row, slot_bias, mixed, top, total, HAS_CODES, HEAD_DIM, PADDED_DIM, BLOCK_KEYS, DOT_DTYPE,
        )  # fmt: skip

    if HAS_WRITE_POSITION:
        tail_tokens = tl.load(write_position).to(tl.int32) + num_tokens
    # A new token sees the past and the new ones up to itself; the block's last token sees the most.
    visible = tail_tokens - num_tokens + 1 + token
    last_token = tl.minimum((block * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUPS, num_tokens - 1)
    begin = tl.maximum((part - num_slot_parts) * keys_per_part, 0)
    end = tl.minimum(tail_tokens - num_tokens + 1 + last_token, (part - num_slot_parts + 1) * keys_per_part)
    tail_at = head.to(tl.int64) * tail_head_stride
    mixed, top, total = _see_tail(
        queries, scale, begin, end, key, value, tail_at, tail_token_stride, visible, mixed, top, total,
        HEAD_DIM, PADDED_DIM, BLOCK_KEYS, DOT_DTYPE,
    )  # fmt: skip
    output_at = ((part.to(tl.int64) * num_tokens + token) * num_heads + query_head) * HEAD_DIM
    mass_at = (part.to(tl.int64) * num_heads + query_head) * num_tokens + token
    _store(output + output_at, log_mass + mass_at, mixed, top, total, is_row, HEAD_DIM, PADDED_DIM)


@triton.jit
def _see_slots(  # noqa: PLR0913, PLR0917
    queries, scale, begin, end, slot_key, slot_value, key_codes, value_codes, key_scale, value_scale,
    slot_group, slot_row, slot_bias, mixed, top, total,
    HAS_CODES: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Add slots [begin, end) to a running softmax."""
    column, dim = tl.arange(0, BLOCK_KEYS), tl.arange(0, PADDED_DIM)
    key_at, value_at = column[None] * HEAD_DIM + dim[:, None], column[:, None] * HEAD_DIM + dim[None]
    for start in range(begin, end, BLOCK_KEYS):
        is_key = start + column < end
        is_key_entry = is_key[None] & (dim < HEAD_DIM)[:, None]
        is_value_entry = is_key[:, None] & (dim < HEAD_DIM)[None]
        if HAS_CODES:
            group = tl.load(slot_group + start + column, mask=is_key, other=-1)
            row = tl.load(slot_row + start + column, mask=is_key, other=0)
            keys = _decoded(
                slot_key, key_codes, key_scale, row[None], group[None], dim[:, None], is_key_entry,
                HEAD_DIM, DOT_DTYPE,
            )  # fmt: skip
            values = _decoded(
                slot_value, value_codes, value_scale, row[:, None], group[:, None], dim[None], is_value_entry,
                HEAD_DIM, DOT_DTYPE,
            )  # fmt: skip
        else:
            at = tl.cast(start, tl.int64) * HEAD_DIM
            keys = tl.load(slot_key + at + key_at, mask=is_key_entry, other=0.0)
            values = tl.load(slot_value + at + value_at, mask=is_value_entry, other=0.0)
        bias = tl.load(slot_bias + start + column, mask=is_key, other=float("-inf")).to(tl.float32)
        scores = tl.dot(queries, keys.to(DOT_DTYPE), input_precision="ieee") * scale + bias[None] * LOG2_E
        mixed, top, total = add_keys(scores, values, mixed, top, total, DOT_DTYPE, "ieee")
    return mixed, top, total


@triton.jit
def _see_tail(  # noqa: PLR0913, PLR0917
    queries, scale, begin, end, key, value, head_at, token_stride, visible, mixed, top, total,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr, DOT_DTYPE: tl.constexpr,
):  # fmt: skip
    """Add exact keys [begin, end) of the head at `head_at` to a running softmax; a row sees `visible` keys."""
    column, dim = tl.arange(0, BLOCK_KEYS), tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    # 64 bits for where a block of keys begins, 32 within it: 64-bit tensors would take up the registers.
    key_at, value_at = column[None] * token_stride + dim[:, None], column[:, None] * token_stride + dim[None]
    for start in range(begin, end, BLOCK_KEYS):
        where = start + column
        is_key = where < end
        at = head_at + tl.cast(start, tl.int64) * token_stride
        keys = tl.load(key + at + key_at, mask=is_key[None] & is_dim[:, None], other=0.0)
        values = tl.load(value + at + value_at, mask=is_key[:, None] & is_dim[None], other=0.0)
        scores = tl.dot(queries, keys.to(DOT_DTYPE), input_precision="ieee") * scale
        scores = tl.where(is_key[None] & (where[None] < visible[:, None]), scores, float("-inf"))
        mixed, top, total = add_keys(scores, values, mixed, top, total, DOT_DTYPE, "ieee")
    return mixed, top, total


@triton.jit
def _store(output, log_mass, mixed, top, total, is_row, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Write a part's normalised output and its log mass; `output` and `log_mass` are pointers, one for each row."""
    dim = tl.arange(0, PADDED_DIM)
    is_seen = total > 0
    divisor = tl.where(is_seen, total, 1.0)
    tl.store(
        output[:, None] + dim[None],
        (mixed / divisor[:, None]).to(output.dtype.element_ty),
        mask=(is_row & is_seen)[:, None] & (dim < HEAD_DIM)[None],
    )
    mass = tl.where(is_seen, (top + tl.log2(divisor)) / LOG2_E, float("-inf"))
    tl.store(log_mass, mass, mask=is_row)


@triton.jit
def _decoded(  # noqa: PLR0913, PLR0917
    exact, codes, scale, row, group, dim, is_entry, HEAD_DIM: tl.constexpr, DOT_DTYPE: tl.constexpr
):
    """A block of slots, some of them in int8; row, group and dim broadcast to its shape."""
    is_coded = is_entry & (group >= 0)
    numbers = tl.load(codes + row * HEAD_DIM + dim, mask=is_coded, other=0).to(tl.float32)
    numbers *= tl.load(scale + group * HEAD_DIM + dim, mask=is_coded, other=0.0)
    others = tl.load(exact + row * HEAD_DIM + dim, mask=is_entry & (group < 0), other=0.0)
    return tl.where(is_coded, numbers.to(DOT_DTYPE), others.to(DOT_DTYPE))


@triton.jit(do_not_specialize=["num_parts"])
def merge_kernel(
    part_output,  # (num_parts, num_tokens, num_attention_heads, HEAD_DIM) float32; unwritten where the mass is -inf
    part_log_mass,  # (num_parts, num_attention_heads, num_tokens) float32
    output,  # (num_tokens, num_attention_heads, HEAD_DIM)
    log_mass,  # (num_attention_heads, num_tokens) float32
    num_parts,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The parts' outputs, weighted by their share of the mass; grid (num_tokens, num_attention_heads)."""
    token, head = tl.program_id(0), tl.program_id(1)
    num_tokens, num_heads = tl.num_programs(0), tl.num_programs(1)
    dim, index = tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_PARTS)
    is_dim = dim < HEAD_DIM
    output_at, mass_at = token * num_heads + head, head * num_tokens + token

    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([PADDED_DIM], tl.float32)
    for start in range(0, num_parts, BLOCK_PARTS):
        part = tl.cast(start + index, tl.int64) * num_tokens * num_heads
        mass = tl.load(part_log_mass + part + mass_at, mask=start + index < num_parts, other=float("-inf"))
        mass *= LOG2_E
        is_seen = mass > float("-inf")
        new_top = tl.maximum(top, tl.max(mass, 0))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(mass - finite_top)
        kept = tl.exp2(top - finite_top)
        at = (part + output_at) * HEAD_DIM
        outputs = tl.load(part_output + at[:, None] + dim[None], mask=is_seen[:, None] & is_dim[None], other=0.0)
        mixed = mixed * kept + tl.sum(outputs * weight[:, None], 0)
        total = total * kept + tl.sum(weight, 0)
        top = new_top
    merged = mixed / total
    tl.store(output + output_at * HEAD_DIM + dim, merged.to(output.dtype.element_ty), mask=is_dim)
    tl.store(log_mass + mass_at + tl.zeros([1], tl.int32), (top + tl.log2(total)) / LOG2_E)
