"""How the terminal shows a memory at work: events as progress bars and lines, a session's size as one line."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    Event,
    ReadProgress,
    SessionRebuilt,
    WindowExceeded,
)
from am_memory.session import Session

STAGES = {"repeat": "repeating the block", "score": "scoring its keys", "fit": "fitting its slots"}


class EventBars:
    """Turns events into progress bars on a live display; finished compactions stay as lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
        )

    def __call__(self, event: Event) -> None:
        match event:
            case ReadProgress(_, done, total):
                self._show("reading", done, total)
            case CompactionProgress(_, stage, done, total):
                self._show(STAGES[stage], done, total)
            case CompactionFinished(_, report):
                self._console.print(describe(report))
            case WindowExceeded(_, logical_tokens, window_tokens):
                self._console.print(
                    f"[yellow]{logical_tokens} tokens: past the {window_tokens} positions that the model was trained on[/]"
                )
            case SessionRebuilt(_, num_tokens, reason):
                self._console.print(f"[yellow]reading {num_tokens} tokens again: {reason}[/]")

    def _show(self, description: str, done: int, total: int) -> None:
        for task in self.progress.tasks:
            if task.description == description:
                self.progress.update(task.id, completed=done, total=total, visible=done < total)
                return
        self.progress.add_task(description, completed=done, total=total, visible=done < total)


def describe(report: CompactionReport) -> Text:
    """One line for one compaction."""
    return Text.from_markup(
        f"[bold magenta]compacted[/] tokens {report.start}-{report.end} into {report.num_slots:.0f} slots per head: "
        f"cache {report.kv_tokens_before:.0f} -> {report.kv_tokens_after:.0f} tokens, "
        f"{megabytes(report.kv_bytes_before)} -> {megabytes(report.kv_bytes_after)}, {report.seconds:.1f} s, "
        f"error {report.output_error:.2f}"
    )


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def status(session: Session, trigger: int) -> Text:
    """The live line: logical against physical tokens."""
    stats = session.stats
    width = 24
    full = min(round(width * stats.kv_tokens / trigger), width)
    return Text.from_markup(
        f"[dim]{stats.logical_tokens} tokens of conversation | cache [/][cyan]{'█' * full}[/][dim]{'░' * (width - full)} "
        f"{stats.kv_tokens:.0f}/{trigger} tokens, {megabytes(stats.kv_bytes)} of {megabytes(stats.exact_kv_bytes)} | "
        f"{stats.num_compactions} compactions[/]"
    )
