"""Attention over ragged, biased slots and an exact tail on a GPU: one launch for all of it, and one to merge its parts.

Few queries see their keys in parts of `KEYS_PER_PART`, so that one token's work fills the machine; many queries fill it
by themselves, and see all their keys in one go. No step waits for the device, and what is allocated comes from torch's
pool. The definition is `partwise.attend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.slots import Slots
from am_memory.solver.triton_support import MAX_HEAD_DIM, dot_dtype, padded, power_of_two_from, runs_triton

KEYS_PER_PART = 128
MAX_SPLIT_ROWS = 64
"""Queries of one KV head (tokens times its group) up to which its keys are split."""
BLOCK_PARTS = 16
"""Parts merged at a time."""
NUM_WARPS = 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_attend(query: Tensor) -> bool:
    """Whether there is a kernel for these queries' device, dtype and head_dim, and no gradient to take through it."""
    return (
        query.dtype in DTYPES
        and query.shape[-1] <= MAX_HEAD_DIM
        and not (query.requires_grad and torch.is_grad_enabled())
        and runs_triton(query.device)
    )


def block_sizes(num_rows: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """What a program works on at a time: (padded head_dim, queries, keys), powers of two and at least 16.

    A block of keys, and one of values, take 32 KiB each where a program sees one block alone, and 16 KiB where it loads
    the next while it works on one, so that all fit in the shared memory of any GPU that `can_attend` takes. In float32
    there are no tensor cores: of more queries, the products would not fit in registers.
    """
    padded_dim = padded(head_dim)
    block_rows = min(max(power_of_two_from(num_rows), 16), 64 if element_size == 2 else 16)
    most_keys, most_bytes = (KEYS_PER_PART, 2**15) if is_split(num_rows) else (64, 2**14)
    return padded_dim, block_rows, max(min(most_keys, most_bytes // (padded_dim * element_size)), 16)


def is_split(num_rows: int) -> bool:
    """Whether the keys of so few queries are shared out to programs."""
    return num_rows <= MAX_SPLIT_ROWS


def launch_options(num_rows: int, *, has_codes: bool) -> dict[str, int]:
    """Slots in int8 take a load more for each of theirs: of two stages, shared memory would not hold them all."""
    return {"num_warps": NUM_WARPS, "num_stages": 1 if has_codes or is_split(num_rows) else 2}


def _pointers(slots: Slots) -> tuple[Tensor, ...]:
    """What the kernel reads of slots, in its order; where none is in int8 it is told so, and some stand for nothing."""
    key, value = slots.key, slots.value
    if isinstance(key, Quantised) and isinstance(value, Quantised):
        in_int8 = key.codes, value.codes, key.scale, value.scale, *key.index  # keys and values are grouped alike
        return key.exact, value.exact, *in_int8, slots.bias, slots.cu_slots_tensor
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    return key, value, key, value, key, value, key, key, slots.bias, slots.cu_slots_tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots | None, scaling: float, place: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention.attend`, of which the arguments and results are.

    All of one dtype of `DTYPES`, but for slots in int8, which are decoded as they are loaded; the last axis of query,
    key and value is contiguous, and key and value are laid out alike, as a `TailBuffer`'s are.
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
    if is_split(num_rows):
        keys_per_part = KEYS_PER_PART
        num_slot_parts = triton.cdiv(longest, keys_per_part)
        num_parts = num_slot_parts + triton.cdiv(tail_tokens, keys_per_part)
    else:  # slots and tail in one part
        keys_per_part, num_slot_parts, num_parts = max(longest, tail_tokens), 0, 1
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
            key if place is None else place,
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
            HAS_PLACE=place is not None,
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
