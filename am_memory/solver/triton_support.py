"""Helpers of all Triton kernels that do not need Triton itself: whether it runs here, sizes, dtypes."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch

MAX_HEAD_DIM = 256
"""The largest head that the kernels take."""


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run here: an NVIDIA GPU from Ampere on, Triton, and the C compiler that it needs."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    )


def padded(head_dim: int) -> int:
    """Width in which a kernel holds a head: a power of two, at least 16."""
    return max(power_of_two_from(head_dim), 16)


def power_of_two_from(number: int) -> int:
    """Smallest power of two >= number."""
    return 1 << (number - 1).bit_length()


def dot_dtype(kernel: object, dtype: torch.dtype) -> Any:
    """The dtype in which a kernel multiplies. In Triton's interpreter float32: it multiplies the bits of bfloat16."""
    import triton
    import triton.language as tl

    is_compiled = isinstance(kernel, triton.JITFunction)
    return getattr(tl, str(dtype).removeprefix("torch.")) if is_compiled else tl.float32
