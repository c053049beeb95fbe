"""`am-memory chat`: a conversation in the terminal that outgrows its cache, and continues after a restart."""

from __future__ import annotations

import importlib
import itertools
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from am_memory.cli.display import EventBars, describe_lookup, mark_lookup, show_error, stats_table, status
from am_memory.cli.options import POLICY_OPTIONS, Loading, StoreURL, default_store, is_given, with_options
from am_memory.errors import AMMemoryError, SessionChanged

if TYPE_CHECKING:
    from am_memory.memory import Memory
    from am_memory.session.session import Session
    from am_memory.text.sampling import Sampling

COMMANDS = "/compact, /stats, /mount TEXT, /unmount TEXT, /fork NAME, /save, /quit"
SHOWN_MESSAGES = 6
"""Messages of a saved conversation that are shown when it continues."""


@with_options(Loading())
def chat(
    loading: Loading,
    context: typer.Context,
    session: Annotated[str, typer.Option(help="Name of the conversation; a saved one continues.")] = "default",
    store: StoreURL = None,
    system: Annotated[str | None, typer.Option(help="System prompt of a new conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
) -> None:
    """Chat in the terminal, without an end. /compact, /stats, /mount TEXT, /unmount TEXT, /fork NAME, /save, /quit."""
    from am_memory.text.sampling import Sampling

    console = Console(highlight=False)
    bars = EventBars(console)
    with bars.showing(f"loading {loading.model}"):
        memory = loading.load(store=store or default_store(), on_event=bars)
        memory.prefers_saved_policy = not any(is_given(context, option) for option in POLICY_OPTIONS)
        conversation = memory.session(session)
        if system is not None and not conversation.tokens:
            conversation.append([{"role": "system", "content": system}])
    sampling = Sampling(temperature=temperature, top_p=0.95 if temperature else None)
    Chat(console, bars, memory, conversation, sampling, max_new_tokens).run()


@dataclass
class Chat:
    """A chat in the terminal; `session` is its current branch."""

    console: Console
    bars: EventBars
    memory: Memory
    session: Session
    sampling: Sampling
    max_new_tokens: int

    def run(self) -> None:
        """Take turns until /quit or the end of the input."""
        with suppress(ImportError):  # not on every platform; it gives the prompt line editing and a history
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
            self.console.print(f"[dim]saved; to continue: am-memory chat --session {escape(self.session.name)}[/]")

    def save(self) -> None:
        """Save the conversation; under a new name if another process has saved one under this name meanwhile."""
        try:
            self.session.save()
        except SessionChanged:
            name, names = self.session.name, self.memory.names()
            free = next(free for number in itertools.count(2) if (free := f"{name}-{number}") not in names)
            self.session = self.session.fork(free)
            self.session.save()
            self.console.print(
                f"[dim]another process has saved {escape(name)} meanwhile: this chat continues as {escape(free)}[/]"
            )

    def read_line(self) -> str:
        """Show how full the cache is, and read the next line; "/quit" at the end of the input."""
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
        """Append a message and stream the answer; an interrupt before the first token takes the message back."""
        num_tokens, is_answered = len(self.session.tokens), False
        shown = set[tuple[str | None, int, int]]()
        try:
            with self.bars.showing():
                self.session.append([{"role": "user", "content": line}])
            for piece in self.session.generate(self.max_new_tokens, self.sampling):
                found = [span for span in piece.looked_up if (span.mount, span.start, span.end) not in shown]
                shown |= {(span.mount, span.start, span.end) for span in found}
                if found and is_answered:
                    self.console.print(mark_lookup(found), end="", soft_wrap=True)
                elif found:
                    self.console.print(describe_lookup(found), soft_wrap=True)
                is_answered = True
                self.console.out(piece.text, end="", highlight=False)
            self.console.print()
        except BaseException:
            if not is_answered:
                with self.bars.showing():  # if the message was compacted, many tokens are read again
                    self.session.rewind(num_tokens)
            raise

    def run_command(self, line: str) -> None:
        """Run a line that begins with a slash."""
        match line.split(maxsplit=1):
            case ["/compact"]:
                with self.bars.showing():
                    self.session.compact()
            case ["/stats"]:
                self.console.print(stats_table(self.session))
            case ["/mount", name]:
                with self.bars.showing():
                    self.session.mount(name)
                self.console.print(f"[dim]{escape(str(self.session.mounts[-1].text))}[/]")
            case ["/unmount", name]:
                self.session.unmount(name)
            case ["/fork", name]:
                self.save()
                self.session = self.session.fork(name)
                self.console.print(f"[dim]now in {escape(name)}; the branch before it stays as it is[/]")
            case ["/save"]:
                self.save()
                self.console.print("[dim]saved[/]")
            case _:
                self.console.print(f"[dim]{COMMANDS}[/]")
