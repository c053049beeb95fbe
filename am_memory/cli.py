"""The command `am-memory`: a demonstration, a terminal chat with a memory, and a look into saved sessions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from am_memory.demo import run_demo
from am_memory.display import EventBars, status
from am_memory.errors import AMMemoryError, CompactionFailed
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.sampling import Sampling
from am_memory.session import Session
from am_memory.storage import Store

app = typer.Typer(
    help="Unbounded conversations in a bounded KV cache, compacted online by Attention Matching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Option(help='A hub id, a folder, a .gguf file, or "demo" for the bundled model.')]
TriggerTokens = Annotated[int, typer.Option(help="Physical cache size, in tokens, that fires a compaction.")]
KeepRatio = Annotated[float, typer.Option(help="Slots kept for each compacted token.")]
StoreURL = Annotated[str, typer.Option(help="Where sessions are saved: a folder or any fsspec URL.")]

DEFAULT_STORE = str(Path.home() / ".local" / "share" / "am_memory" / "sessions")
@app.command()
def demo(
    model: Model = "demo",
    trigger_tokens: TriggerTokens = 1024,
    keep_ratio: KeepRatio = 0.2,
    turns: Annotated[int, typer.Option(help="Letters to read.")] = 10,
    seed: Annotated[int, typer.Option(help="Other letters, other facts.")] = 0,
) -> None:
    """Hold a conversation far longer than the cache, and ask what is left of it."""
    run_demo(console, model, MemoryPolicy(trigger_tokens=trigger_tokens, keep_ratio=keep_ratio), turns, seed)


@app.command()
def chat(
    model: Model = "demo",
    trigger_tokens: TriggerTokens = 2048,
    keep_ratio: KeepRatio = 0.1,
    session: Annotated[str, typer.Option(help="Name of the conversation; it goes on where it was saved.")] = "default",
    store: StoreURL = DEFAULT_STORE,
    system: Annotated[str | None, typer.Option(help="System prompt of a new conversation; kept exact.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
) -> None:
    """Chat in the terminal, without an end. /compact, /stats, /fork NAME, /save, /quit."""
    bars = EventBars(console)
    with console.status(f"loading {model}"):
        policy = MemoryPolicy(trigger_tokens=trigger_tokens, keep_ratio=keep_ratio)
        memory = Memory.from_pretrained(model, policy=policy, store=store, on_event=bars)
        conversation = memory.session(session)
    if not conversation.tokens and system is not None:
        conversation.append([{"role": "system", "content": system}])
    for message in conversation.messages[-6:]:
        console.print(f"[dim]{message['role']}: {message['content']}[/]", markup=True, highlight=False)
    console.print("[dim]/compact, /stats, /fork NAME, /save, /quit[/]")
    sampling = Sampling(temperature=temperature, top_p=0.95 if temperature else None)
    while True:
        console.print(status(conversation, trigger_tokens))
        try:
            line = console.input("[bold green]you[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            line = "/quit"
        try:
            if line == "/quit":
                break
            elif line.startswith("/"):
                conversation = command(line, conversation, bars)
            elif line:
                turn(conversation, line, max_new_tokens, sampling, bars)
                conversation.save()
        except AMMemoryError as error:
            console.print(f"[red]{error}[/]")
    if conversation.tokens:
        conversation.save()
        console.print(f"[dim]saved as {conversation.name!r} in {store}[/]")


def turn(session: Session, line: str, max_new_tokens: int, sampling: Sampling, bars: EventBars) -> None:
    """Say one thing and stream the answer; control-C ends the answer, not the chat."""
    with bars.progress:
        session.append([{"role": "user", "content": line}])
    console.print("[bold blue]model[/] ", end="")
    try:
        for piece in session.generate(max_new_tokens, sampling):
            console.print(piece.text, end="", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]", end="")
    console.print()


def command(line: str, session: Session, bars: EventBars) -> Session:
    """Run one command of the chat; the session to go on with."""
    match line.split(maxsplit=1):
        case ["/compact"]:
            try:
                with bars.progress:
                    session.compact()
            except CompactionFailed as error:
                console.print(f"[yellow]{error}[/]")
        case ["/stats"]:
            for name, value in asdict(session.stats).items():
                console.print(f"{name:18s} {value:,.1f}" if isinstance(value, float) else f"{name:18s} {value:,}")
        case ["/fork", name]:
            session = session.fork(name)
            console.print(f"now in {name!r}; the other branch stays as it was")
        case ["/save"]:
            session.save()
            console.print("saved")
        case _:
            console.print("commands: /compact, /stats, /fork NAME, /save, /quit")
    return session


@app.command()
def inspect(
    session: Annotated[str | None, typer.Argument(help="Its name; none lists what is stored.")] = None,
    store: StoreURL = DEFAULT_STORE,
) -> None:
    """Show what a saved session holds: tokens, segments, slots by layer and head, bytes."""
    folder = Store(store)
    if session is None:
        for name in folder.names():
            console.print(name)
        return
    saved = folder.load(session)
    console.print(f"{session}: {len(saved.tokens)} tokens, {len(saved.schedule)} compactions, model {saved.fingerprint}")
    segments = Table("segment", "tokens", "slots (all heads)", "compacted at")
    at_tokens = {entry.plan.newest.start: entry.at_tokens for entry in saved.schedule}
    for number, segment in enumerate(saved.state.segments, 1):
        segments.add_row(
            str(number), f"{segment.start}-{segment.end}", str(segment.num_slots), str(at_tokens.get(segment.start, ""))
        )
    console.print(segments)
    layers = Table("layer", "slots of each KV head", "exact", "MiB")
    for row in saved.layer_rows():
        layers.add_row(*row)
    console.print(layers)


def main() -> None:
    """Run the command line; errors of ours are one line and exit status 1."""
    try:
        app()
    except AMMemoryError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/] {error}", soft_wrap=True)
        raise SystemExit(1) from error
