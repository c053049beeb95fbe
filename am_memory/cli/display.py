"""How the terminal shows a memory at work: events as bars and lines, sizes as lines and tables. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionReport,
    Event,
    GateMissed,
    OriginalsLost,
    PolicyChanged,
    ReadProgress,
    SessionRebuilt,
    WindowExceeded,
)
from am_memory.kv_cache.layers import LayerState, TailState
from am_memory.session.session import Session
from am_memory.storage.session_file import SavedSession

STAGES = {
    "repeat": "  repeating the block",
    "self_study": "  writing about what was said",
    "summary": "  summing up what was said",
    "score": "  scoring its keys",
    "fit": "  fitting its heads",
}
BAR_CELLS = 20
MIB = 2**20
LEVELS = " ▁▂▃▄▅▆▇█"


class EventBars:
    """The listener of the command line: bars while `showing`, and a line for what is worth keeping.

    Where nothing is shown, an answer is being written: a compaction is then marked inside it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    @contextmanager
    def showing(self, waiting_for: str | None = None) -> Iterator[None]:
        """Show bars while the body runs; on what is no terminal, lines alone.

        Args:
            waiting_for: what runs, where it sends no events.
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
        try:
            with self._progress as progress:
                if waiting_for is not None:
                    progress.add_task(waiting_for, total=None)
                yield
        finally:
            self._progress = None
            self._bars.clear()

    def step(self, description: str, done: int, total: int) -> None:
        """Move a bar on; it vanishes when it is full."""
        if self._progress is None:
            return
        if description not in self._bars:
            self._bars[description] = self._progress.add_task(description)
        self._progress.update(self._bars[description], completed=done, total=total, visible=done < total)

    def __call__(self, event: Event) -> None:
        match event:
            case ReadProgress(_, done, total):
                self.step("reading tokens", done, total)
            case CompactionProgress(_, stage, done, total):
                self.step(STAGES[stage], done, total)
            case CompactionFinished(_, report) if self._progress is None:
                self._console.print(
                    f" [magenta]⟨compacted {report.end - report.start} tokens into {report.num_slots:.0f} slots⟩[/] ",
                    end="",
                )
            case CompactionFinished(_, report):
                self._console.print(describe(report), soft_wrap=True)
            case GateMissed(_, start, end, held_out_error, max_error):
                error = f"an error of {held_out_error:.2f} is above the {max_error:g} of max_error"
                self._warn(f"tokens {start:,}-{end:,}: {error}, and there was no room for more slots")
            case WindowExceeded() | PolicyChanged():
                self._warn(str(event))
            case OriginalsLost(_, start, end, reason):
                self._warn(f"the originals of tokens {start:,}-{end:,} are lost: {reason}")
            case SessionRebuilt(_, num_tokens, reason):
                self._warn(f"reading {num_tokens:,} tokens again: {reason}")

    def _warn(self, text: str) -> None:
        self._console.print(f"[yellow]  {text}[/]", soft_wrap=True)


def describe(report: CompactionReport) -> Text:
    """One line for one compaction."""
    return Text.from_markup(
        f"  [bold magenta]compacted[/] tokens {report.start:,}-{report.end:,} to {report.num_slots:.0f} slots per head"
        f"[dim]: {report.kv_tokens_before:.0f} → {report.kv_tokens_after:.0f} tokens, "
        f"{report.kv_bytes_before / MIB:.1f} → {megabytes(report.kv_bytes_after)}, {report.seconds:.1f} s[/]"
    )


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / MIB:.1f} MiB"


def status(session: Session) -> Text:
    """The live line: physical tokens against the trigger, logical ones, bytes, compactions."""
    stats = session.stats
    trigger_tokens = session.trigger_tokens
    full = min(round(BAR_CELLS * stats.kv_tokens / trigger_tokens), BAR_CELLS)
    times = "1 compaction" if stats.num_compactions == 1 else f"{stats.num_compactions} compactions"
    return Text.from_markup(
        f"  [cyan]{'█' * full}[/][dim]{'░' * (BAR_CELLS - full)}[/] [cyan]{stats.kv_tokens:.0f}[/]/{trigger_tokens} "
        f"tokens in the cache[dim], {stats.logical_tokens:,} said · {stats.kv_bytes / MIB:.1f} of "
        f"{megabytes(stats.exact_kv_bytes)} · {times}[/]"
    )


def stats_table(session: Session) -> Table:
    """All figures of a session."""
    stats = session.stats
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_row("tokens of the conversation", f"{stats.logical_tokens:,}")
    table.add_row("tokens in the cache", f"{stats.kv_tokens:,.0f}, {stats.exact_tokens:,} of them exact")
    table.add_row("bytes of the cache", f"{megabytes(stats.kv_bytes)}; uncompacted {megabytes(stats.exact_kv_bytes)}")
    table.add_row("compactions", f"{stats.num_compactions}")
    table.add_row("compact segments", f"{stats.num_segments}")
    return table


def segments_table(saved: SavedSession) -> Table:
    """What stands for which tokens, oldest first."""
    state = saved.state
    full_attention = [layer for layer in state.layers if isinstance(layer, TailState)]
    num_heads = sum(len(head_slots(layer)) for layer in full_attention)
    compacted_at = {entry.plan.newest.start: entry.at_tokens for entry in saved.records}
    table = Table("tokens", "held as", "of their size", "compacted at token", title="The conversation, oldest first")
    if state.num_pinned:
        table.add_row(f"0-{state.num_pinned}", "pinned, exact", "100 %", "")
    for segment in state.segments:
        slots = segment.num_slots / num_heads
        share = slots / segment.num_tokens
        at_tokens = compacted_at.get(segment.start)
        when = "" if at_tokens is None else f"{at_tokens:,}"
        table.add_row(f"{segment.start:,}-{segment.end:,}", f"{slots:.1f} slots per head", f"{share:.1%}", when)
    tail = full_attention[0]
    if tail.length:
        start = max(tail.start, state.num_pinned)
        table.add_row(f"{start:,}-{tail.start + tail.length:,}", "exact", "100 %", "")
    return table


def layers_table(saved: SavedSession) -> Table:
    """Compact slots of every KV head of every layer: where the budget puts them."""
    table = Table("layer", "compact slots of each KV head", "", "exact tokens", "MiB", title="Layers")
    num_pinned = saved.state.num_pinned if saved.state.segments else 0
    counts = [
        [count - num_pinned for count in head_slots(layer)] if isinstance(layer, TailState) else []
        for layer in saved.state.layers
    ]
    most = max((count for heads in counts for count in heads), default=0)
    for index, (layer, heads) in enumerate(zip(saved.state.layers, counts, strict=True)):
        if not isinstance(layer, TailState):
            table.add_row(str(index), "sliding window", "", "", f"{layer_bytes(layer) / MIB:.2f}")
            continue
        bars = "".join(LEVELS[round((len(LEVELS) - 1) * max(count, 0) / max(most, 1))] for count in heads)
        shown = "  ".join(f"{max(count, 0):4d}" for count in heads)
        exact = f"{layer.length + num_pinned:,}"
        table.add_row(str(index), shown, f"[cyan]{bars}[/]", exact, f"{layer_bytes(layer) / MIB:.2f}")
    return table


def head_slots(layer: TailState) -> list[int]:
    """Slots of each KV head, pinned ones included."""
    if layer.slots is not None:
        return [end - begin for begin, end in pairwise(layer.slots.cu_slots)]
    return [0] * (0 if layer.buffer is None else layer.buffer.key.shape[1])


def layer_bytes(layer: LayerState) -> int:
    """What a layer's tensors take."""
    if isinstance(layer, TailState):
        exact = () if layer.buffer is None else (layer.buffer.key, layer.buffer.value)
        tensors = [*exact, *(layer.slots.tensors if layer.slots is not None else ())]
    else:
        tensors = [tensor for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)
