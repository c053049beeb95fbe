"""`am-memory inspect` and `am-memory delete`: sessions as they lie in a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from am_memory.cli.display import one_line
from am_memory.cli.options import StoreURL, default_store
from am_memory.errors import SessionNotFound
from am_memory.formatting import MEBIBYTE, mebibytes

if TYPE_CHECKING:
    from am_memory.kv_cache.layers import TailState
    from am_memory.storage.session_file import SavedSession

LEVELS = " ▁▂▃▄▅▆▇█"
LOST = ((0.5, "little"), (0.08, "some details"), (0.04, "most details"), (0.0, "all but the gist"))
"""What a segment has likely lost, by the least share of its size that it still has."""


def inspect(
    session: Annotated[str | None, typer.Argument(help="Its name; without one, all names are listed.")] = None,
    store: StoreURL = None,
) -> None:
    """Show what a saved session holds: segments, slots of every layer and head, bytes."""
    from am_memory.session.mounts import Mounts, NamedText
    from am_memory.storage.store import Store

    console, folder = Console(highlight=False), Store(store or default_store())
    if session is None:
        names = folder.names()
        console.print(Text("\n".join(names) if names else f"no sessions in {folder.url}"))
        return
    saved = folder.load(session)
    num_bytes = sum(layer.nbytes for layer in saved.state.layers)
    model = one_line(saved.model_name) or saved.fingerprint
    console.print(
        f"[bold]{escape(session)}[/]: {len(saved.tokens):,} tokens, {len(saved.messages)} messages, "
        f"{len(saved.records)} compactions, {mebibytes(num_bytes)} of cache, model {escape(model)}",
        soft_wrap=True,
    )
    if saved.mount_records:
        mounts = Mounts(tuple(NamedText(text, start) for start, text in saved.texts), saved.mount_records)
        for named, record in mounts.mounted:
            console.print(f"mounted at token {record.at_tokens:,}: {escape(str(named.text.about))}")
    console.print(segments_table(saved))
    if saved.state.segments:
        console.print(f"[dim]{recallable(saved)}[/]")
    console.print(layers_table(saved))


def delete(session: Annotated[str, typer.Argument(help="Its name.")], store: StoreURL = None) -> None:
    """Delete a saved session, even if it cannot be read. Needs no model."""
    from am_memory.storage.store import Store

    folder = Store(store or default_store())
    if session not in folder.names():
        raise SessionNotFound(
            f"no session {session!r} in {folder.url!r}; there are: {', '.join(folder.names()) or 'none'}"
        )
    folder.delete(session)
    Console(highlight=False).print(f"deleted {escape(session)}")


def tail_layers(saved: SavedSession) -> dict[int, TailState]:
    """The layers whose caches grow with the conversation, by index, without sliding windows and recurrent states."""
    from am_memory.kv_cache.layers import TailState

    return {index: layer for index, layer in enumerate(saved.state.layers) if isinstance(layer, TailState)}


def segments_table(saved: SavedSession) -> Table:
    """How each span of the conversation is held, oldest first."""
    state, layers = saved.state, [*tail_layers(saved).values()]
    num_heads = sum(len(layer.head_slots) for layer in layers)
    refined = {(one.start, one.end) for record in saved.records for one in record.refinements}
    compacted_at = {record.plan.newest.start: record.at_tokens for record in saved.records}
    columns = ("tokens", "held as", "of their size", "likely lost", "compacted at")
    table = Table(*columns, title="The conversation, oldest first")
    if state.num_pinned_slots:
        table.add_row(f"0-{state.num_pinned_slots}", "pinned, exact", "100 %", "nothing", "")
    for segment in state.segments:
        slots = segment.num_slots / num_heads
        share = slots / segment.num_tokens
        at_tokens = compacted_at.get(segment.start)
        when = "" if at_tokens is None else f"{at_tokens:,}"
        held = f"{slots:.1f} slots per head" + (", refined" if (segment.start, segment.end) in refined else "")
        table.add_row(f"{segment.start:,}-{segment.end:,}", held, f"{share:.1%}", likely_lost(share), when)
        for page in sorted(saved.recalled):
            if segment.start <= page.start < segment.end:
                table.add_row(f"  {page.start:,}-{page.end:,}", "  recalled, exact for now", "100 %", "nothing", "")
    tail = layers[0]
    if tail.length:
        start = max(tail.start, state.num_pinned_slots)
        table.add_row(f"{start:,}-{tail.start + tail.length:,}", "exact", "100 %", "nothing", "")
    return table


def likely_lost(share: float) -> str:
    """What slots have probably lost, by their share of the tokens for which they stand.

    At a tenth, six compactions kept 23 of 24 codes, and fifty 15. Below a twentieth, details are found by recall alone.
    """
    return next(words for least, words in LOST if share >= least)


def recallable(saved: SavedSession) -> str:
    """In a sentence or two, what is lost and what can come back."""
    num_compacted = sum(segment.num_tokens for segment in saved.state.segments)
    num_kept = sum(one.end - one.start for one in saved.left_out)
    details = "Details are names, numbers and exact words; the gist goes last."
    if not num_kept:
        return f"{details} Their exact entries were not saved: what is lost is lost for good."
    return (
        f"{details} The exact entries of {min(num_kept, num_compacted):,} of {num_compacted:,} compacted tokens are "
        "saved: a detail is exact again when a message asks for it and recall finds its place."
    )


def layers_table(saved: SavedSession) -> Table:
    """Compact slots of every KV head of every layer: where the budget puts them."""
    from am_memory.kv_cache.layers import RecurrentState

    table = Table("layer", "compact slots of each KV head", "", "exact tokens", "MiB", title="Layers")
    num_pinned = saved.state.num_pinned_slots
    tails = tail_layers(saved)
    most = max((count - num_pinned for layer in tails.values() for count in layer.head_slots), default=0)
    for index, layer in enumerate(saved.state.layers):
        mib = f"{layer.nbytes / MEBIBYTE:.2f}"
        if (tail := tails.get(index)) is None:
            held = "recurrent state" if isinstance(layer, RecurrentState) else "sliding window"
            table.add_row(str(index), held, "", "", mib)
            continue
        counts = [max(count - num_pinned, 0) for count in tail.head_slots]
        bars = "".join(LEVELS[round((len(LEVELS) - 1) * count / max(most, 1))] for count in counts)
        shown = "  ".join(f"{count:4d}" for count in counts)
        table.add_row(str(index), shown, f"[cyan]{bars}[/]", f"{tail.length + num_pinned:,}", mib)
    return table
