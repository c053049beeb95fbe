"""The best rates of a machine, and the peak memory of a run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: torch.device, clock: Callable[[], float]) -> float:
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


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """The peak memory of a run, in bytes, beyond the memory in use before it. It includes the results that stay."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
