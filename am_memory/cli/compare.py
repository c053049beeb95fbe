"""`am-memory compare`: what is still known of a text or a chat, held in several ways, and what each way costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from am_memory.cli.display import EventBars
from am_memory.cli.options import Loading, text_of, with_options
from am_memory.errors import InvalidInput
from am_memory.formatting import mebibytes

if TYPE_CHECKING:
    from am_memory.cli.comparison.judge import Outcome
    from am_memory.cli.comparison.material import Material
    from am_memory.memory import Memory
    from am_memory.policy import MemoryPolicy

CAPTION = (
    "known: right answers, by greedy decoding. log prob.: of the right answers, in nats, mean; higher is better. KL: "
    "how far the prediction of the text's next message is from the full cache's, in nats per token; 0 is the same."
)


@with_options(Loading(trigger_tokens=384))
def compare(
    loading: Loading,
    text: Annotated[Path | None, typer.Option(help="A text file to read.", show_default="letters of its own")] = None,
    chat: Annotated[
        Path | None, typer.Option(help='A chat to read, JSONL: {"role": ..., "content": ...} a line.')
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help='What to ask, JSONL: {"question": ..., "answer": ...} a line.',
            show_default="to finish sentences of the text",
        ),
    ] = None,
    num_questions: Annotated[int, typer.Option(min=0, help="Sentences to finish, without --questions.")] = 8,
    policy: Annotated[
        list[Path] | None,
        typer.Option(help="A row of its own: a JSON file of MemoryPolicy's fields; may be repeated."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the table into this .svg file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write all figures and answers into this .json file.")] = None,
) -> None:
    """Compare am-memory with the full cache, eviction, a sliding window and summaries, on a text of yours."""
    from am_memory.cli.comparison.picture import draw

    material = material_of(text, chat, questions, num_questions)
    rows = policies_of(loading, policy or [])
    for file in filter(None, (plot, out)):
        if not file.parent.is_dir():
            raise InvalidInput(f"{file} cannot be written: there is no folder {file.parent}; create it first")
    console = Console(highlight=False)
    bars = EventBars(console)
    with bars.showing(f"loading {loading.model}"):
        memory = loading.load(on_event=bars)
    with bars.showing(is_brief=True):
        outcomes = outcomes_of(memory, material, rows, bars)
    title = f"{memory.engine.info.name}, cache limit {memory.scratch(policy=rows['am-memory']).trigger_tokens:,} tokens"
    console.print(outcomes_table(outcomes, title))
    console.print(f"[dim]{CAPTION}[/]")
    console.print(conclusion(outcomes))
    if plot is not None:
        plot.write_text(draw(outcomes, title), encoding="utf-8")
        console.print(f"the picture: {plot}", soft_wrap=True, markup=False)
    if out is not None:
        rows_of = {"title": title, "rows": [asdict(outcome) for outcome in outcomes]}
        out.write_text(json.dumps(rows_of, indent=1) + "\n", encoding="utf-8")
        console.print(f"all figures and answers: {out}", soft_wrap=True, markup=False)


def material_of(text: Path | None, chat: Path | None, questions: Path | None, num_questions: int) -> Material:
    """What to read and to ask, as the options say."""
    from am_memory.cli.comparison import material

    if text is not None and chat is not None:
        raise InvalidInput(f"--text {text} and --chat {chat}: give one of them")
    if text is not None:
        read = material.of_text(text, num_questions)
    elif chat is not None:
        read = material.of_chat(chat, num_questions)
    else:
        read = material.of_letters()
    return read if questions is None else material.with_questions(read, questions)


def policies_of(loading: Loading, files: Sequence[Path]) -> dict[str, MemoryPolicy]:
    """The policy of the options, and for each file the same policy with the fields of the file.

    Raises:
        InvalidInput: a file that is no JSON object, or two of one name.
        InvalidPolicy: a field that the policy does not have, or a value out of its range.
    """
    policies = {"am-memory": loading.policy}
    for file in files:
        if file.stem in policies:
            raise InvalidInput(f"--policy {file}: there is a row {file.stem!r} already; rename the file")
        try:
            fields = json.loads(text_of(file))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"--policy {file}: {error}: give a JSON object of MemoryPolicy's fields") from error
        if not isinstance(fields, dict):
            raise InvalidInput(f"--policy {file}: give a JSON object of MemoryPolicy's fields")
        policies[file.stem] = loading.policy.with_changes(**fields)
    return policies


def outcomes_of(
    memory: Memory, material: Material, policies: dict[str, MemoryPolicy], bars: EventBars
) -> list[Outcome]:
    """Hold the conversation in each way, and judge it before the next."""
    from am_memory.cli.comparison.judge import Judge
    from am_memory.cli.comparison.ways import held_in_all_ways

    outcomes: list[Outcome] = []
    judge: Judge | None = None
    ways = held_in_all_ways(
        memory, material.turns, policies, lambda name: lambda done, total: bars.step(f"{name}: reading", done, total)
    )
    for held in ways:
        if judge is None:
            if held.session.stats.num_compactions:
                window = memory.engine.info.window_tokens
                raise InvalidInput(
                    f"{len(held.session.tokens):,} tokens are more than the {window:,} of the model's context window, "
                    "so there is no full cache to compare with: give a shorter text"
                )
            judge = Judge(held.session, material, lambda done, total: bars.step("asking", done, total))
        outcomes.append(judge.judge(held))
    return outcomes


def outcomes_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A row for each way to hold the conversation."""
    table = Table(title=title)
    table.add_column("")
    columns = ("known", "log prob.", "KL", "tokens held", "bytes held", "s to read", "s an answer")
    for column in columns:
        table.add_column(column, justify="right")
    for one in outcomes:
        asked = len(one.answers)
        known = f"[bold]{one.num_right}[/] of {asked}" if asked else ""
        log_probability = "" if one.log_probability is None else f"{one.log_probability:.2f}"
        to_answer = "" if one.seconds_to_answer is None else f"{one.seconds_to_answer:.1f}"
        sizes = (f"{one.kv_tokens:,.0f}", mebibytes(one.kv_bytes))
        table.add_row(
            escape(one.name), known, log_probability, f"{one.kl:.3f}", *sizes, f"{one.seconds_to_read:.1f}", to_answer
        )
    return table


def conclusion(outcomes: Sequence[Outcome]) -> str:
    """The table in a sentence or two."""
    full, ours = outcomes[0], outcomes[1]
    others = [f"{one.name} {one.num_right}" for one in outcomes[2:]]
    size = f"am-memory holds {ours.kv_tokens / full.kv_tokens:.0%} of the full cache's tokens"
    if not ours.answers:
        return f"{size}."
    counts = f"knows {ours.num_right} of the {len(ours.answers)} answers; the full cache knows {full.num_right}"
    return f"{size}, and {counts} ({', '.join(others)})."
