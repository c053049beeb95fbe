"""`am-memory demo`: letters with facts in them, far longer than the cache, and what the model recalls of them.

Three readers get the same questions: the memory, a plain cache of the same size (the first four tokens of the
conversation and its last ones), and a plain cache that holds everything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from am_memory.cli.display import EventBars, status
from am_memory.cli.letters import Fact, Letter, letters
from am_memory.cli.options import Loading, with_options
from am_memory.formatting import mebibytes

if TYPE_CHECKING:
    from am_memory.session.session import Session

MEMORY, TRUNCATED, EVERYTHING = "memory", "truncated to the same size", "everything kept"


@with_options(Loading(trigger_tokens=512, keep_ratio=0.2))
def demo(
    loading: Loading,
    num_letters: Annotated[int, typer.Option("--letters", min=2, max=18, help="Letters that the model reads.")] = 9,
    seed: Annotated[int, typer.Option(help="Another seed writes other letters with other ships.")] = 0,
) -> None:
    """Read letters far longer than the cache, compact again and again, and test what the model recalls."""
    from am_memory.cli.questions import PLAIN, ask

    console = Console(highlight=False)
    bars = EventBars(console)
    with bars.showing(f"loading {loading.model}"):
        memory = loading.load(on_event=bars)
    written = letters(seed, num_letters)
    session = memory.session("memory")
    console.print(introduction(loading.model, session, num_letters))
    ends = read_letters(console, bars, session, written)
    cut_off, everything = (memory.session(name, policy=PLAIN) for name in (TRUNCATED, EVERYTHING))
    num_recent = round(session.stats.kv_tokens) - PLAIN.num_sinks
    with bars.showing():
        cut_off.append([*session.tokens[: PLAIN.num_sinks], *session.tokens[-num_recent:]])
        for number, letter in enumerate(written, 1):
            bars.step("the same letters into a plain cache", number, len(written))
            everything.append(letter.messages)
    readers = {MEMORY: session, TRUNCATED: cut_off, EVERYTHING: everything}
    answers = {}
    for name, reader in readers.items():
        with bars.showing(f"asking for every ship: {name}", is_brief=True):
            answers[name] = ask(reader, [fact for letter in written for fact in letter.facts])
    num_lost = sum(end <= ends[-1] - num_recent for end in ends)
    console.print(answers_table(written, answers))
    console.print(sizes_table(written, answers, readers, num_lost))
    console.print(conclusion(loading.model, written, answers, readers))


def read_letters(console: Console, bars: EventBars, session: Session, written: Sequence[Letter]) -> list[int]:
    """Read letter after letter, and show what happens.

    Returns:
        For each letter the number of tokens of the conversation up to its end.
    """
    started, ends = time.perf_counter(), []
    for number, letter in enumerate(written, 1):
        ships = " and ".join(f"ship {fact.town} {fact.code}" for fact in letter.facts)
        console.print(f"[bold]letter {number}[/] of {len(written)}: [green]{ships}[/] in small talk")
        with bars.showing():
            session.append(letter.messages)
        ends.append(len(session.tokens))
        console.print(status(session), soft_wrap=True)
    console.print(f"[dim]{ends[-1]:,} tokens read in {time.perf_counter() - started:.0f} s[/]\n")
    return ends


def introduction(model: str, session: Session, num_letters: int) -> Panel:
    """The panel that introduces the demo."""
    policy = session.policy
    name = "SmolLM2-135M-Instruct, the bundled model," if model == "demo" else Path(model).name
    return Panel(
        f"{name} reads {num_letters} letters. Its KV cache may hold [cyan]{session.trigger_tokens}[/] tokens: whenever "
        f"it is full, its oldest {policy.compact_fraction:.0%} is compacted by Attention Matching, the exact tokens in "
        f"it to {policy.keep_ratio:.0%} of their number, and reading continues. Afterwards the model is asked for "
        "the ships that the letters named, and looks each up among the compacted tokens. Two plain caches are asked as "
        "well, one of the same size and one that kept everything.",
        title="am-memory demo",
        border_style="cyan",
    )


Answers = Mapping[str, Mapping[Fact, str]]
"""By the name of a reader: its answer for each fact."""


def answers_table(written: Sequence[Letter], answers: Answers) -> Table:
    """Every answer, letter by letter."""
    table = Table("letter", "ships in it", *answers, title='"Which ship was it?" "It was the ship ..."')
    for number, letter in enumerate(written, 1):
        ships = "  ".join(f"{fact.town} {fact.code}" for fact in letter.facts)
        cells = ("  ".join(mark(fact, answer[fact]) for fact in letter.facts) for answer in answers.values())
        table.add_row(str(number), ships, *cells)
    return table


def conclusion(model: str, written: Sequence[Letter], answers: Answers, readers: Mapping[str, Session]) -> str:
    """What was seen, in a sentence, and three next steps."""
    facts = [fact for letter in written for fact in letter.facts]
    right = {name: sum(answer[fact] == fact.code for fact in facts) for name, answer in answers.items()}
    share = readers[MEMORY].stats.kv_bytes / max(readers[EVERYTHING].stats.kv_bytes, 1)
    chat_model = "MODEL" if model == "demo" else model
    return (
        f"\nIn {share:.0%} of the cache's bytes, the memory knows {right[MEMORY]} of {len(facts)} ships; the whole "
        f"cache knows {right[EVERYTHING]}, and the last letters alone {right[TRUNCATED]}.\n\n"
        "Next:\n"
        "  am-memory compare --text FILE   what is still known of a text of yours\n"
        f"  am-memory chat --model {chat_model}    a talk without an end (docs/models.md)\n"
        "  README.md                       Python, generate(), LangChain, a server"
    )


def mark(fact: Fact, answer: str) -> str:
    """An answer with its mark: right or wrong."""
    return f"[green]✓ {answer}[/]" if answer == fact.code else f"[red]✗ {answer or '-'}[/]"


def sizes_table(written: Sequence[Letter], answers: Answers, readers: Mapping[str, Session], num_lost: int) -> Table:
    """How much each reader recalls, and how large its cache is.

    Args:
        num_lost: letters that the truncated reader has lost, the first ones.
    """
    table = Table("", *readers, title="Ships recalled, and the size of the cache")
    groups = {f"letters 1-{num_lost}": written[:num_lost], f"letters {num_lost + 1}-{len(written)}": written[num_lost:]}
    for title, some in groups.items():
        facts = [fact for letter in some for fact in letter.facts]
        counts = (sum(answer[fact] == fact.code for fact in facts) for answer in answers.values())
        table.add_row(f"ships recalled, {title}", *(f"[bold]{count}[/] of {len(facts)}" for count in counts))
    stats = [reader.stats for reader in readers.values()]
    table.add_row("tokens in the cache", *(f"{stat.kv_tokens:,.0f}" for stat in stats))
    table.add_row("bytes of the cache", *(mebibytes(stat.kv_bytes) for stat in stats))
    table.add_row("compactions", *(str(stat.num_compactions) for stat in stats))
    return table
