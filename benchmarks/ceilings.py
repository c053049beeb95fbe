"""What a machine could do at best, and what a run took of its memory."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second of memory read and written by a copy that no cache holds, median of five."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, rates = torch.empty_like(source), []
    for _ in range(6):
        synchronize()
        started = clock()
        target.copy_(source)
        synchronize()
        rates.append(2 * source.nbytes / (clock() - started))
    return statistics.median(rates[1:])


def peak_bytes(device: torch.device, run: Callable[[], object]) -> float:
    """What the run held beyond what was held before it, at its peak; NaN where nobody counts.

    On a GPU, of its memory; else of the process's, which only Linux tells.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        run()
        return math.nan
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # what was freed before must not hide what comes
        libc.malloc_trim(0)
    reset.write_text("5")
    before = _kibibytes(status, "VmRSS")
    run()
    return (_kibibytes(status, "VmHWM") - before) * 1024


def _kibibytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
