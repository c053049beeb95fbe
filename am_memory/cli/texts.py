"""`am-memory text compact|list|delete`: compact texts in a store, for `/mount` in a chat and for `Session.mount`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from am_memory.cli.display import EventBars, one_line
from am_memory.cli.options import Loading, StoreURL, default_store, text_of, with_options
from am_memory.errors import TextNotFound
from am_memory.formatting import mebibytes

texts = typer.Typer(help="Compact texts: documents that are read once, and mounted in any chat.", no_args_is_help=True)


@with_options(Loading())
def compact(
    loading: Loading,
    file: Annotated[Path, typer.Argument(help="A text file.", exists=True, dir_okay=False)],
    name: Annotated[str | None, typer.Option(help="Its name.", show_default="that of the file")] = None,
    store: StoreURL = None,
) -> None:
    """Read a text file once, compact it whole, and save it in the store."""
    content, console = text_of(file), Console(highlight=False)
    bars = EventBars(console)
    with bars.showing(f"loading {loading.model}"):
        memory = loading.load(store=store or default_store(), on_event=bars)
        text = memory.compact_text(content, name or file.stem)
    console.print(f"{escape(str(text))}, {mebibytes(text.num_bytes)}")


def list_texts(store: StoreURL = None) -> None:
    """List the compact texts in the store. Needs no model."""
    from am_memory.storage.store import Store

    console, folder = Console(highlight=False), Store(store or default_store())
    table = Table("name", "tokens", "slots per head", "size", "begins with")
    for text in folder.texts.all():
        size = mebibytes(text.num_bytes)
        row = (text.name, f"{text.num_tokens:,}", f"{text.num_slots:,.0f}", size, text.preview)
        table.add_row(*(escape(one_line(cell)) for cell in row))
    console.print(table if table.row_count else f"no compact texts in {folder.url}")


def delete(name: Annotated[str, typer.Argument(help="Its name.")], store: StoreURL = None) -> None:
    """Delete a compact text, even if it cannot be read. Sessions that have mounted it keep it."""
    from am_memory.storage.store import Store

    folder = Store(store or default_store())
    if name not in (names := folder.texts.names()):
        raise TextNotFound(name, names)
    folder.texts.delete(name)
    Console(highlight=False).print(f"deleted {escape(name)}")


texts.command("compact")(compact)
texts.command("list")(list_texts)
texts.command("delete")(delete)
