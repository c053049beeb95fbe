"""What the GPU of this machine can run."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether it is a GPU that Triton knows well, and Triton is there, with the C compiler that builds its launcher."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    )
