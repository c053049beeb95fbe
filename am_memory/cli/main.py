"""The command `am-memory`: one module for each command. Loads no torch before a command runs."""

from __future__ import annotations

import typer
from rich.console import Console
from typer.core import TyperGroup

from am_memory.cli.calibrate import calibrate
from am_memory.cli.chat import chat
from am_memory.cli.compare import compare
from am_memory.cli.demo import demo
from am_memory.cli.display import show_error
from am_memory.cli.saved import delete, inspect
from am_memory.cli.serve import serve
from am_memory.cli.texts import texts
from am_memory.errors import AMMemoryError


class Commands(TyperGroup):
    """Shows an error of this library as one line, and exits with status 1."""

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
for command in (demo, chat, serve, compare, calibrate, inspect, delete):
    app.command()(command)
app.add_typer(texts, name="text")


def main() -> None:
    """The entry point of `am-memory`."""
    app()
