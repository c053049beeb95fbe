"""Terminal output: events as progress bars and lines, sizes as lines and tables. Changes no session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import LogRecord
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from am_memory.errors import AMMemoryError
from am_memory.event_log import logger as events
from am_memory.events import (
    CompactionFinished,
    CompactionReport,
    Event,
    GateMissed,
    LittleKept,
    OriginalsDropped,
    OriginalsLost,
    OriginUnknown,
    PolicyChanged,
    SessionRebuilt,
    Span,
    WindowExceeded,
)
from am_memory.formatting import MEBIBYTE, cache_bytes, counted, mebibytes, shortened
from am_memory.session.progress import step_of

if TYPE_CHECKING:
    from am_memory.session.session import Session

BAR_CELLS = 20
SPAN_CHARS = 60
"""A longer text of a span is shortened in the middle."""


class EventBars:
    """The listener of the command line: progress bars inside `showing`, and a line for each important event.

    Outside `showing` an answer is being streamed, and a compaction is marked inside the text.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._is_brief = False
        self._bars: dict[str, TaskID] = {}

    @contextmanager
    def showing(self, waiting_for: str | None = None, *, is_brief: bool = False) -> Iterator[None]:
        """Show progress bars during the block; if the output is not a terminal, show lines only.

        Args:
            waiting_for: text of a bar without a length, for work that emits no events.
            is_brief: show no lines for compactions, for work that makes many of them on the way.
        """
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._is_brief = is_brief
        try:
            with self._progress as progress, silent_log():
                if waiting_for is not None:
                    progress.add_task(waiting_for, total=None)
                yield
        finally:
            self._progress, self._is_brief = None, False
            self._bars.clear()

    def step(self, description: str, done: int, total: int) -> None:
        """Advance a bar; a full bar disappears."""
        if self._progress is None:
            return
        if description not in self._bars:
            self._bars[description] = self._progress.add_task(description)
        self._progress.update(self._bars[description], completed=done, total=total, visible=done < total)

    def __call__(self, event: Event) -> None:
        if (step := step_of(event)) is not None:
            self.step(*step)
        match event:
            case CompactionFinished(_, report) if self._progress is None:
                self._console.print(
                    f" [magenta]⟨compacted {report.end - report.start} tokens into {report.num_slots:.0f} slots⟩[/] ",
                    end="",
                )
            case CompactionFinished(_, report) if not self._is_brief:
                self._console.print(describe(report), soft_wrap=True)
            case GateMissed(_, start, end, held_out_error, max_error):
                error = f"the held-out error {held_out_error:.2f} is above max_error {max_error:g}"
                self._warn(f"tokens {start:,}-{end:,}: {error}, and there was no room for more slots")
            case LittleKept(_, num_slots, num_tokens) if not self._is_brief:
                kept = f"{num_slots:.0f} slots per head stand for {num_tokens:,} compacted tokens, less than 5 %"
                self._warn(f"{kept}: details are found by recall alone; a larger --trigger-tokens keeps more")
            case OriginUnknown(_, parts):
                self._warn(f"it is not recorded which {' and '.join(parts)} it was saved with: this model's is assumed")
            case WindowExceeded() | PolicyChanged():
                self._warn(str(event))
            case OriginalsLost(_, start, end, reason):
                self._warn(f"the originals of tokens {start:,}-{end:,} are lost: {reason}")
            case OriginalsDropped(_, start, end, reason):
                self._warn(f"the originals of tokens {start:,}-{end:,} are dropped: {reason}")
            case SessionRebuilt(_, num_tokens, reason):
                self._warn(f"reading {num_tokens:,} tokens again: {reason}")

    def _warn(self, text: str) -> None:
        self._console.print(f"[yellow]  {text}[/]", soft_wrap=True)


@contextmanager
def silent_log() -> Iterator[None]:
    """Events are shown; without a handler, Python would write the log's warnings to the terminal once more."""
    events.addFilter(_nothing)
    try:
        yield
    finally:
        events.removeFilter(_nothing)


def _nothing(record: LogRecord) -> bool:
    return False


def describe(report: CompactionReport) -> Text:
    """A compaction in one line."""
    return Text.from_markup(
        f"  [bold magenta]compacted[/] tokens {report.start:,}-{report.end:,} to {report.num_slots:.0f} slots per head"
        f"[dim]: {report.kv_tokens_before:.0f} → {report.kv_tokens_after:.0f} tokens, "
        f"{report.kv_bytes_before / MEBIBYTE:.1f} → {mebibytes(report.kv_bytes_after)}, {report.seconds:.1f} s[/]"
    )


def describe_lookup(spans: Sequence[Span]) -> Text:
    """In one line, what a message looked up."""
    return Text(f"  looked up: {_quoted(spans)}", style="dim")


def mark_lookup(spans: Sequence[Span]) -> Text:
    """The same inside the text of an answer, which looked it up itself."""
    return Text(f" ⟨looked up: {_quoted(spans)}⟩ ", style="dim")


def one_line(text: str) -> str:
    """A text of somebody else on one line, without the control characters that a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _quoted(spans: Sequence[Span]) -> str:
    """The texts of spans, each on one line."""
    texts = (one_line(span.text) for span in spans)
    return " · ".join(f"“{shortened(text, SPAN_CHARS)}”" for text in texts)


def status(session: Session) -> Text:
    """The status line: tokens in the cache and the trigger, tokens of the conversation, bytes, compactions."""
    stats = session.stats
    trigger_tokens = session.trigger_tokens
    full = min(round(BAR_CELLS * stats.kv_tokens / trigger_tokens), BAR_CELLS)
    times = "1 compaction" if stats.num_compactions == 1 else f"{stats.num_compactions} compactions"
    held = mebibytes(stats.kv_bytes)
    if stats.num_compactions:  # before, they differ by spare capacity alone
        held = f"{stats.kv_bytes / MEBIBYTE:.1f} of {mebibytes(stats.exact_kv_bytes)}"
    return Text.from_markup(
        f"  [cyan]{'█' * full}[/][dim]{'░' * (BAR_CELLS - full)}[/] [cyan]{stats.kv_tokens:.0f}[/]/{trigger_tokens} "
        f"tokens in the cache[dim], {stats.logical_tokens:,} in all · {held} · {times}[/]"
    )


def stats_table(session: Session) -> Table:
    """All sizes of a session."""
    stats = session.stats
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("tokens of the conversation", f"{stats.logical_tokens:,}")
    table.add_row("tokens in the cache", f"{stats.kv_tokens:,.0f}, {stats.exact_tokens:,} of them exact")
    table.add_row("bytes of the cache", cache_bytes(stats.kv_bytes, stats.exact_kv_bytes, stats.num_compactions))
    table.add_row("compactions", f"{stats.num_compactions}")
    table.add_row("compact segments", f"{stats.num_segments}")
    if stats.num_refined:
        table.add_row("refined segments", f"{stats.num_refined}")
    for mount in session.mounts:
        table.add_row("mounted", escape(str(mount.text)))
    if stats.recalled_tokens:
        table.add_row("compacted, but exact now", counted(stats.recalled_tokens, "token"))
    return table


def show_error(console: Console, error: AMMemoryError) -> None:
    """Print an error as one line, whatever the width of the terminal."""
    console.print(f"[red]{type(error).__name__}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
