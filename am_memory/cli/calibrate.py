"""`am-memory calibrate`: measure once how many slots each head of a model needs, save it in a file, and plot it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from am_memory.cli.display import EventBars
from am_memory.cli.options import MODEL_HELP, text_of
from am_memory.errors import InvalidInput, how_to_install

if TYPE_CHECKING:
    from am_memory.budgets import Calibration

SHOWN_RATIOS = (0.05, 0.1, 0.2)
"""Ratios at which the plot shows the slots of each head."""


def calibrate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[list[Path], typer.Option(help="A text file to measure on; may be repeated.")],
    out: Annotated[Path, typer.Option(help="The .json file to write.")],
    plot: Annotated[Path | None, typer.Option(help="Also plot the curves and the slots into this image.")] = None,
    block_tokens: Annotated[int, typer.Option(help="Tokens of each text to compact.")] = 256,
) -> None:
    """Measure how many slots each head needs, for MemoryPolicy(head_budget="FILE.json")."""
    from am_memory.cli.questions import PLAIN
    from am_memory.compaction.sensitivity import calibrate as measure
    from am_memory.memory import Memory

    if out.suffix != ".json":
        raise InvalidInput(f"--out {out}: a calibration is a .json file: name it {out.with_suffix('.json')}")
    for file in filter(None, (out, plot)):
        if not file.parent.is_dir():
            raise InvalidInput(f"{file} cannot be written: there is no folder {file.parent}; create it first")
    if plot is not None:
        require_matplotlib()
    texts = [text_of(path) for path in text]
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


def require_matplotlib() -> None:
    """Raise InvalidInput without matplotlib, before anything takes long."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInput(f"--plot needs matplotlib: {how_to_install('bench')}") from error


def draw(calibration: Calibration, path: Path, seq_len: int) -> None:
    """Plot the curve of each head, and the slots of each head at some ratios."""
    import torch
    from matplotlib.figure import Figure

    from am_memory.budgets import calibrated_ranks

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    curves, shares = figure.subplots(1, 2)
    for losses in calibration.losses:
        curves.plot(calibration.ratios, losses, linewidth=0.8, alpha=0.6)
    curves.set(xscale="log", yscale="log", xlabel="slots per key", ylabel="KL, nats per token")
    figure.suptitle(calibration.model, fontsize=10)
    curves.set_title("Loss with one head compacted", fontsize=9)
    num_heads = len(calibration.losses)
    ranks = calibrated_ranks(calibration, torch.ones(num_heads, seq_len), 1)
    for ratio in SHOWN_RATIOS:
        counts = (ranks < ratio * num_heads * seq_len).sum(dim=1) / seq_len
        shares.plot(range(num_heads), counts.sort(descending=True).values, label=f"{ratio:.0%} of all")
    shares.set(xlabel="heads, most slots first", ylabel="slots per key")
    shares.set_title("Slots of each head", fontsize=9)
    shares.legend()
    figure.savefig(path, dpi=150)
