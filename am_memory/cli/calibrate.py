"""`am-memory calibrate`: measure once what each head of a model needs, keep it in a file, and draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from am_memory.budgets import Calibration, calibrated_ranks
from am_memory.cli.demo import PLAIN
from am_memory.cli.display import EventBars
from am_memory.cli.options import MODEL_HELP
from am_memory.compaction.sensitivity import calibrate as measure
from am_memory.errors import InvalidInput
from am_memory.memory import Memory

SHOWN_RATIOS = (0.05, 0.1, 0.2)
"""At which the plot shows what each head gets."""


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[list[Path], typer.Option(help="A text file to measure on; several may be given.")],
    out: Annotated[Path, typer.Option(help="The .json file to write.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the curves and the slots into this image.")] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of each text that are compacted.")] = 256,
) -> None:
    """Measure how much each head is needed, for MemoryPolicy(head_budget="FILE.json")."""
    if out.suffix != ".json":
        raise InvalidInput(
            f"--out {out}: a policy knows a calibration by its ending: name it {out.with_suffix('.json')}"
        )
    for file in filter(None, (out, plot)):
        if not file.parent.is_dir():
            raise InvalidInput(f"{file} cannot be written: there is no folder {file.parent}; make it first")
    if plot is not None:
        require_matplotlib()
    texts = [read(path) for path in text]
    console = Console(highlight=False)
    bars = EventBars(console)
    with bars.showing(f"loading {model}"):
        engine = Memory.from_pretrained(model, engine="transformers", policy=PLAIN).engine
    with bars.showing():
        calibration = measure(
            engine,
            texts,
            block_tokens=block_tokens,
            on_progress=lambda done, total: bars.step("compacting one head at a time", done, total),
        )
    out.write_text(calibration.model_dump_json(indent=1) + "\n", encoding="utf-8")
    console.print(f"{len(calibration.losses)} heads of {calibration.model}: {out}", soft_wrap=True, markup=False)
    if plot is not None:
        draw(calibration, plot, block_tokens)
        console.print(f"their curves and slots: {plot}", soft_wrap=True, markup=False)


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--text {path} cannot be read ({error}): give a text file in UTF-8") from error


def require_matplotlib() -> None:
    """Before anything takes long."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInput("--plot needs matplotlib: pip install 'attention-matching-memory[bench]'") from error


def draw(calibration: Calibration, path: Path, seq_len: int) -> None:
    """The curve of each head, and each head's share of slots at some ratios."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, shares = figure.subplots(1, 2)
    for losses in calibration.losses:
        curves.plot(calibration.ratios, losses, linewidth=0.8, alpha=0.6)
    curves.set(xscale="log", yscale="log", xlabel="slots per key", ylabel="KL, nats per token")
    figure.suptitle(calibration.model, fontsize=10)
    curves.set_title("What is lost with one head compacted", fontsize=9)
    num_heads = len(calibration.losses)
    ranks = calibrated_ranks(calibration, torch.ones(num_heads, seq_len), 1)
    for ratio in SHOWN_RATIOS:
        counts = (ranks < ratio * num_heads * seq_len).sum(dim=1) / seq_len
        shares.plot(range(num_heads), counts.sort(descending=True).values, label=f"{ratio:.0%} of all")
    shares.set(xlabel="heads, richest first", ylabel="slots per key")
    shares.set_title("What the heads get", fontsize=9)
    shares.legend()
    figure.savefig(path, dpi=150)
