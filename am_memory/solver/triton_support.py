"""What the GPU of this machine can run, and what its kernels have in common."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch

MAX_HEAD_DIM = 256
"""That the kernels take."""


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether it is a GPU that Triton knows well, and Triton is there, with the C compiler that builds its launcher."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    )


def padded(head_dim: int) -> int:
    """The power of two, at least 16, in which a kernel holds so many numbers."""
    return max(power_of_two_from(head_dim), 16)


def power_of_two_from(number: int) -> int:
    """The least one that is no less."""
    return 1 << (number - 1).bit_length()


def dot_dtype(kernel: object, dtype: torch.dtype) -> Any:
    """What a kernel multiplies such numbers in: Triton's interpreter multiplies the bit patterns of bfloat16."""
    import triton
    import triton.language as tl

    is_compiled = isinstance(kernel, triton.JITFunction)
    return getattr(tl, str(dtype).removeprefix("torch.")) if is_compiled else tl.float32
