"""The command `am-memory`: a demonstration, a terminal chat with a memory, and a look into saved sessions."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from am_memory.cli.calibrate import calibrate
from am_memory.cli.demo import run_demo
from am_memory.cli.display import (
    EventBars,
    layer_bytes,
    layers_table,
    megabytes,
    segments_table,
    stats_table,
    status,
)
from am_memory.cli.options import (
    POLICY_OPTIONS,
    Compile,
    Device,
    Dtype,
    KeepRatio,
    Model,
    Pinned,
    RunBy,
    TriggerTokens,
    TrustMessages,
    TrustRemoteCode,
    WindowTokens,
    is_given,
    policy_of,
)
from am_memory.cli.serve import serve
from am_memory.errors import AMMemoryError, SessionChanged, SessionNotFound
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Session
from am_memory.storage.store import Store
from am_memory.text.sampling import Sampling

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


app.command()(serve)
app.command()(calibrate)

STORE_HELP = "Where sessions are saved: a folder or any fsspec URL [default: ~/.local/share/am_memory/sessions]."

StoreURL = Annotated[str | None, typer.Option(help=STORE_HELP, show_default=False)]


@app.command()
def demo(
    model: Model = "demo",
    engine: RunBy = "transformers",
    trigger_tokens: TriggerTokens = 512,
    keep_ratio: KeepRatio = 0.2,
    letters: Annotated[int, typer.Option(min=2, max=18, help="How many letters the model reads.")] = 9,
    seed: Annotated[int, typer.Option(help="Other letters, other facts.")] = 0,
) -> None:
    """Read letters far longer than the cache, compact again and again, and ask what is left of them."""
    run_demo(
        Console(highlight=False),
        model,
        engine,
        MemoryPolicy(trigger_tokens=trigger_tokens, keep_ratio=keep_ratio),
        letters,
        seed,
    )


@app.command()
def chat(  # noqa: PLR0913, PLR0917  what can be set
    context: typer.Context,
    model: Model = "demo",
    engine: RunBy = "transformers",
    trigger_tokens: TriggerTokens = 2048,
    keep_ratio: KeepRatio = 0.1,
    pinned: Pinned = "system",
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    trust_messages: TrustMessages = False,
    window_tokens: WindowTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    session: Annotated[str, typer.Option(help="Name of the conversation; it goes on where it was saved.")] = "default",
    store: StoreURL = None,
    system: Annotated[str | None, typer.Option(help="System prompt of a new conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Chat in the terminal, without an end. /compact, /stats, /fork NAME, /save, /quit."""
    console = Console(highlight=False)
    bars = EventBars(console)
    policy = policy_of(trigger_tokens, keep_ratio, pinned)
    with bars.showing(f"loading {model}"):
        memory = Memory.from_pretrained(
            model,
            engine=engine,
            policy=policy,
            device=device,
            dtype=dtype,
            compile=compile,
            store=store or default_store(),
            on_event=bars,
            trust_messages=trust_messages,
            window_tokens=window_tokens,
            trust_remote_code=trust_remote_code,
        )
        memory.has_default_policy = not any(is_given(context, option) for option in POLICY_OPTIONS)
        conversation = memory.session(session)
        if system is not None and not conversation.tokens:
            conversation.append([{"role": "system", "content": system}])
    sampling = Sampling(temperature=temperature, top_p=0.95 if temperature else None)
    Chat(console, bars, memory, conversation, sampling, max_new_tokens).run()


@dataclass
class Chat:
    """A terminal chat; `session` is the branch that it is in."""

    console: Console
    bars: EventBars
    memory: Memory
    session: Session
    sampling: Sampling
    max_new_tokens: int

    def run(self) -> None:
        """Until /quit or the end of the input."""
        with suppress(ImportError):  # not everywhere; it lets the input line be edited and recalled
            importlib.import_module("readline")
        for message in self.session.messages[-SHOWN_MESSAGES:]:
            sign = "> " if message["role"] == "user" else ""
            self.console.print(Text(f"{sign}{message['content']}", style="dim"))
        self.console.print(f"[dim]{COMMANDS}; Ctrl-C stops an answer[/]")
        while (line := self.read_line()) != "/quit":
            try:
                if line.startswith("/"):
                    self.run_command(line)
                elif line:
                    self.take_turn(line)
                    self.save()
            except KeyboardInterrupt:
                self.console.print(" [dim](stopped)[/]")
            except AMMemoryError as error:
                show_error(self.console, error)
        if self.session.tokens:
            self.save()
            self.console.print(f"[dim]saved; am-memory chat --session {escape(self.session.name)} goes on with it[/]")

    def save(self) -> None:
        """Save the conversation; where somebody else has saved one of its name meanwhile, under another name."""
        try:
            self.session.save()
        except SessionChanged:
            name, names = self.session.name, self.memory.names()
            free = next(free for number in itertools.count(2) if (free := f"{name}-{number}") not in names)
            self.session = self.session.fork(free)
            self.session.save()
            self.console.print(f"[dim]{escape(name)} goes on elsewhere, too: this is {escape(free)} from here on[/]")

    def read_line(self) -> str:
        """The next line, after one that shows how full the cache is; "/quit" at the end of the input."""
        self.console.print(status(self.session), soft_wrap=True)
        try:
            line = input("> ").strip()
        except EOFError:
            self.console.print()
            return "/quit"
        except KeyboardInterrupt:
            self.console.print("\n[dim]/quit or Ctrl-D ends the chat[/]")
            return ""
        if not sys.stdin.isatty():
            self.console.out(line, highlight=False)  # nobody has seen it typed
        return line

    def take_turn(self, line: str) -> None:
        """Say one thing and stream the answer; what is interrupted before the answer begins was never said."""
        num_tokens, is_answered = len(self.session.tokens), False
        try:
            with self.bars.showing():
                self.session.append([{"role": "user", "content": line}])
            for piece in self.session.generate(self.max_new_tokens, self.sampling):
                is_answered = True
                self.console.out(piece.text, end="", highlight=False)
            self.console.print()
        except BaseException:
            if not is_answered:
                with self.bars.showing():  # where the message brought about a compaction, much is read again
                    self.session.rewind(num_tokens)
            raise

    def run_command(self, line: str) -> None:
        match line.split(maxsplit=1):
            case ["/compact"]:
                with self.bars.showing():
                    self.session.compact()
            case ["/stats"]:
                self.console.print(stats_table(self.session))
            case ["/fork", name]:
                self.save()
                self.session = self.session.fork(name)
                self.console.print(f"[dim]now in {escape(name)}; the branch before it stays as it is[/]")
            case ["/save"]:
                self.save()
                self.console.print("[dim]saved[/]")
            case _:
                self.console.print(f"[dim]{COMMANDS}[/]")


@app.command()
def inspect(
    session: Annotated[str | None, typer.Argument(help="Its name; without one, all names are listed.")] = None,
    store: StoreURL = None,
) -> None:
    """Show what a saved session holds: segments, slots of every layer and head, bytes."""
    console, folder = Console(highlight=False), Store(store or default_store())
    if session is None:
        names = folder.names()
        console.print(Text("\n".join(names) if names else f"no sessions in {folder.url}"))
        return
    saved = folder.load(session)
    num_bytes = sum(layer_bytes(layer) for layer in saved.state.layers)
    console.print(
        f"[bold]{escape(session)}[/]: {len(saved.tokens):,} tokens, {len(saved.messages)} messages, "
        f"{len(saved.records)} compactions, {megabytes(num_bytes)} of cache, model {saved.fingerprint}"
    )
    console.print(segments_table(saved))
    console.print(layers_table(saved))


@app.command()
def delete(session: Annotated[str, typer.Argument(help="Its name.")], store: StoreURL = None) -> None:
    """Forget a saved session, whether or not it can be read, and with any model."""
    folder = Store(store or default_store())
    if session not in folder.names():
        raise SessionNotFound(
            f"no session {session!r} in {folder.url!r}; there are: {', '.join(folder.names()) or 'none'}"
        )
    folder.delete(session)
    Console(highlight=False).print(f"deleted {escape(session)}")


def default_store() -> str:
    home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return str(Path(home) / "am_memory" / "sessions")


def show_error(console: Console, error: AMMemoryError) -> None:
    """One line, whatever the width of the terminal."""
    console.print(f"[red]{type(error).__name__}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)


def main() -> None:
    app()
