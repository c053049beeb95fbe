"""The command `am-memory`: a demonstration, a terminal chat with a memory, and a look into saved sessions."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from am_memory.demo import run_demo
from am_memory.display import EventBars, layers_table, segments_table, stats_table, status
from am_memory.errors import AMMemoryError
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.sampling import Sampling
from am_memory.session import Session
from am_memory.storage import Store

COMMANDS = "/compact, /stats, /fork NAME, /save, /quit"
SHOWN_MESSAGES = 6
"""Of an earlier conversation, when it goes on."""


class Commands(TyperGroup):
    """Commands whose errors of ours are one line and exit status 1."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except AMMemoryError as error:
            show_error(Console(stderr=True), error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    help="Unbounded conversations in a bounded KV cache, compacted online by Attention Matching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def default_store() -> str:
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(home) / "am_memory" / "sessions")


Model = Annotated[str, typer.Option(help='A hub id, a folder, a .gguf file, or "demo" for the bundled model.')]
TriggerTokens = Annotated[int, typer.Option(help="Size of the cache, in tokens, that fires a compaction.")]
KeepRatio = Annotated[float, typer.Option(help="Slots kept for each token that is compacted.")]
StoreURL = Annotated[str, typer.Option(help="Where sessions are saved: a folder or any fsspec URL.")]


@app.command()
def demo(
    model: Model = "demo",
    trigger_tokens: TriggerTokens = 512,
    keep_ratio: KeepRatio = 0.2,
    letters: Annotated[int, typer.Option(min=2, max=18, help="How many letters the model reads.")] = 12,
    seed: Annotated[int, typer.Option(help="Other letters, other facts.")] = 0,
) -> None:
    """Read letters far longer than the cache, compact again and again, and ask what is left of them."""
    run_demo(Console(), model, MemoryPolicy(trigger_tokens=trigger_tokens, keep_ratio=keep_ratio), letters, seed)


@app.command()
def chat(
    model: Model = "demo",
    trigger_tokens: TriggerTokens = 2048,
    keep_ratio: KeepRatio = 0.1,
    session: Annotated[str, typer.Option(help="Name of the conversation; it goes on where it was saved.")] = "default",
    store: Annotated[StoreURL, typer.Option(default_factory=default_store, show_default=False)] = "",
    system: Annotated[str | None, typer.Option(help="System prompt of a new conversation; it stays exact.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Chat in the terminal, without an end. /compact, /stats, /fork NAME, /save, /quit."""
