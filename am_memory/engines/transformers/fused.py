"""Attention over ragged, biased slots and an exact tail on a GPU: one launch to attend, and one to merge parts.

The keys of few queries are split into parts of `KEYS_PER_PART`, so that one token's work fills the GPU. Many queries
fill it by themselves and attend to all their keys in one program. No step waits for the device. The definition is
`partwise.attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.slots import Slots
from am_memory.solver.triton_support import MAX_HEAD_DIM, dot_dtype, padded, power_of_two_from, runs_triton

KEYS_PER_PART = 128
MAX_SPLIT_ROWS = 64
"""The most queries of one KV head (tokens times its group) for which keys are split."""
BLOCK_PARTS = 16
"""Parts that a program merges at a time."""
NUM_WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_attend(query: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel for these queries' device, dtype and head_dim, and no gradient to take through it.

    Values must be as wide as keys.
    """
    return (
        query.dtype in DTYPES
        and value.shape[-1] == query.shape[-1] <= MAX_HEAD_DIM
        and not (query.requires_grad and torch.is_grad_enabled())
        and runs_triton(query.device)
    )


def block_sizes(num_rows: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """The block sizes of a program: (padded head_dim, queries, keys), powers of two and at least 16.

    A block of keys takes 32 KiB of shared memory, and so does one of values; 16 KiB each if the program loads the next
    block while it computes. Both fit into every GPU that `can_attend` allows. float32 has no tensor cores: the products
    of more queries would not fit into registers.
    """
    padded_dim = padded(head_dim)
    block_rows = min(max(power_of_two_from(num_rows), 16), 64 if element_size == 2 else 16)
    most_keys, most_bytes = (KEYS_PER_PART, 2**15) if is_split(num_rows) else (64, 2**14)
    return padded_dim, block_rows, max(min(most_keys, most_bytes // (padded_dim * element_size)), 16)


def is_split(num_rows: int) -> bool:
    """Whether the keys of this many queries are split into parts."""
    return num_rows <= MAX_SPLIT_ROWS


def launch_options(num_rows: int, *, has_codes: bool) -> dict[str, int]:
    """Int8 slots need an extra load for each block; with two stages they would not fit into shared memory."""
    return {"num_warps": NUM_WARPS, "num_stages": 1 if has_codes or is_split(num_rows) else 2}


def _pointers(slots: Slots) -> tuple[Tensor, ...]:
    """The kernel's arguments for slots, in its order; without int8 rows those for codes are placeholders."""
    key, value = slots.key, slots.value
    if isinstance(key, Quantised) and isinstance(value, Quantised):
        in_int8 = key.codes, value.codes, key.scale, value.scale, *key.index  # keys and values have the same groups
        return key.exact, value.exact, *in_int8, slots.bias, slots.cu_slots_tensor
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    return key, value, key, value, key, value, key, key, slots.bias, slots.cu_slots_tensor


def _parts(num_rows: int, num_slots: int, tail_tokens: int) -> tuple[int, int, int]:
    """Keys in each part, parts of slots, and parts in all; many queries see slots and tail in one part."""
    if not is_split(num_rows):
        return max(num_slots, tail_tokens), 0, 1
    num_slot_parts = -(-num_slots // KEYS_PER_PART)
    return KEYS_PER_PART, num_slot_parts, num_slot_parts - (-tail_tokens // KEYS_PER_PART)


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float, write_position: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `attention.attend` for arguments and results.

    All tensors have one dtype of `DTYPES`; int8 slots are decoded as they are loaded. The last axis of query, key and
    value is contiguous, and key and value have the same strides, as those of a `TailBuffer` do.
    """
    import triton

    from am_memory.engines.transformers.kernels import attend_kernel, merge_kernel

    _, num_attention_heads, num_tokens, head_dim = query.shape
    num_heads, tail_tokens = key.shape[1:3]
    groups = num_attention_heads // num_heads
    num_rows = num_tokens * groups
    query = query if query.stride(3) == 1 else query.contiguous()
    assert key.stride() == value.stride()
    assert key.stride(3) == 1

    longest = 0 if slots is None else slots.longest
    has_codes = slots is not None and isinstance(slots.key, Quantised)
    keys_per_part, num_slot_parts, num_parts = _parts(num_rows, longest, tail_tokens)
    is_merged = num_parts > 1

    shape = num_tokens, num_attention_heads, head_dim
    output, log_mass = query.new_empty(shape), query.new_empty(num_attention_heads, num_tokens, dtype=torch.float32)
    parts = output, log_mass
    if is_merged:
        parts = log_mass.new_empty(num_parts, *shape), log_mass.new_empty(num_parts, *log_mass.shape)
    padded_dim, block_rows, block_keys = block_sizes(num_rows, head_dim, query.element_size())
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        attend_kernel[num_parts, num_heads, triton.cdiv(num_rows, block_rows)](
            query,
            key,
            value,
            *((key,) * 10 if slots is None else _pointers(slots)),
            key if write_position is None else write_position,
            *parts,
            scaling,
            num_tokens,
            tail_tokens,
            num_slot_parts,
            keys_per_part,
            query.stride(1),
            query.stride(2),
            key.stride(1),
            key.stride(2),
            HAS_SLOTS=longest > 0,
            HAS_CODES=has_codes,
            HAS_WRITE_POSITION=write_position is not None,
            GROUPS=groups,
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_dim,
            BLOCK_ROWS=block_rows,
            BLOCK_KEYS=block_keys,
            DOT_DTYPE=dot_dtype(attend_kernel, query.dtype),
            **launch_options(num_rows, has_codes=has_codes),
        )
        if is_merged:
            merge_kernel[num_tokens, num_attention_heads](
                *parts, output, log_mass, num_parts, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, BLOCK_PARTS=BLOCK_PARTS
            )
    return output.transpose(0, 1)[None], log_mass[None]
