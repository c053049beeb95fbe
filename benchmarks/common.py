"""Statistics, and tables for docs/benchmarks/: shared by the benchmarks."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from am_memory.engines.transformers.compiled import CompiledLayer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def kl_divergence(full: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(full || other); both (num_tokens, vocab_size) logits."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def mean_spread(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def mean_of(rows: Sequence[Mapping[str, object]], name: str) -> float:
    """The mean of one number over the rows of a JSON file."""
    return statistics.fmean(float(str(row[name])) for row in rows)


def machine() -> str:
    """The machine, for the figures' caption."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


@contextmanager
def drawing(path: str, size: tuple[float, float], num_plots: int = 1) -> Iterator[Sequence[Axes]]:
    """Plots beside each other, without a frame; the file is written when they are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, num_plots, figsize=size, layout="constrained", squeeze=False)
    yield grid[0]
    for axis in grid[0]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def uncompiled(model: Any, run: Callable[[], float]) -> float:
    """Run with a compiled model's layers as they were before."""
    compiled = {part: part.forward for part in model.modules() if isinstance(part.forward, CompiledLayer)}
    try:
        for layer, forward in compiled.items():
            layer.forward = forward.eager
        return run()
    finally:
        for layer, forward in compiled.items():
            layer.forward = forward


def read_json(path: str | None) -> Any:
    """The content that `write_json` wrote; an empty list if the file does not exist."""
    return json.loads(Path(path).read_text()) if path is not None and Path(path).exists() else []


def write_json(path: str | None, content: object) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
