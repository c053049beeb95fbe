"""Compiles the attention kernels for two kinds of GPU, neither of which need be there; prints shared memory in bytes.

python tests/engines/compile_kernels.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from am_memory.engines.transformers import fused
from am_memory.engines.transformers.kernels import attend_kernel, merge_kernel
from am_memory.solver.exact import block_sizes
from am_memory.solver.exact_kernels import energy_kernel, mass_kernel

COMPUTE_CAPABILITIES = (80, 90)
CASES = (("bf16", 128, 1), ("fp16", 256, 512), ("fp32", 128, 1))  # dtype, head_dim, tokens
GROUPS = 4
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
IN_FLOAT32 = {"part_output", "part_log_mass", "log_mass", "key_scale", "value_scale", "max_logit", "share", "energy"}


def compiled(
    kernel: triton.JITFunction, dtype: str, constants: dict[str, object], capability: int, options: dict[str, int]
) -> int:
    """Shared memory of one variant, in bytes; pointers and strides are multiples of 16, as those of a cache are."""

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("scaling", "scale"):
            return "fp32"
        if name in ("cu_slots", "slot_group", "slot_row"):
            return "*i32"
        if name == "write_position":
            return "*i64"
        if name.endswith("_codes"):
            return "*i8"
        if name.endswith("stride") or name.startswith("num_") or name in ("tail_tokens", "keys_per_part", "seq_len"):
            return "i32"
        is_float32 = name in IN_FLOAT32 or (name == "output" and kernel is mass_kernel)
        return "*fp32" if is_float32 else f"*{dtype}"

    signature = {name: type_of(name) for name in kernel.arg_names}
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={
            places[name]: [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*") or name.endswith("stride")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return int(triton.compile(source, target=target, options=options).metadata.shared)


def main() -> None:
    for capability in COMPUTE_CAPABILITIES:
        for dtype, head_dim, num_tokens in CASES:
            padded_dim, block_rows, block_keys = fused.block_sizes(
                num_tokens * GROUPS, head_dim, DTYPES[dtype].primitive_bitwidth // 8
            )
            dims = {"HEAD_DIM": head_dim, "PADDED_DIM": padded_dim}
            blocks = {"BLOCK_ROWS": block_rows, "BLOCK_KEYS": block_keys}
            rest = {"HAS_SLOTS": True, "GROUPS": GROUPS, "DOT_DTYPE": DTYPES[dtype]}
            for has_codes in (False, True):
                constants = {**dims, **blocks, **rest, "HAS_CODES": has_codes, "HAS_WRITE_POSITION": num_tokens == 1}
                options = fused.launch_options(num_tokens * GROUPS, has_codes=has_codes)
                print(compiled(attend_kernel, dtype, constants, capability, options), flush=True)
            merge = compiled(merge_kernel, dtype, {**dims, "BLOCK_PARTS": fused.BLOCK_PARTS}, capability, {})
            print(merge, flush=True)
            if dtype != "fp32":
                constants = {"HAS_BIAS": True, "HEAD_DIM": head_dim, "DOT_DTYPE": DTYPES[dtype]}
                for kernel in (mass_kernel, energy_kernel):
                    print(compiled(kernel, dtype, constants | block_sizes(head_dim), capability, {}), flush=True)


if __name__ == "__main__":
    main()
