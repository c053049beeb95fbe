"""What the benchmarks share: statistics, and tables for docs/benchmarks.md."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def kl_divergence(full: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(full || other); both (num_tokens, vocab_size) logits."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def mean_spread(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def machine() -> str:
    """The machine, for the figures' caption."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def read_json(path: str | None) -> Any:
    """What `write_json` wrote; an empty list where there is no such file."""
    return json.loads(Path(path).read_text()) if path is not None and Path(path).exists() else []


def write_json(path: str | None, content: object) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
