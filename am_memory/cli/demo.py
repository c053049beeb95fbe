"""The demonstration: letters with a few facts among small talk, far longer than the cache, and what is left of them.

The same questions are asked of three readers: the memory, a plain cache of the same physical size (the last tokens of
the conversation, and its first four), and a plain cache that holds everything.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from am_memory.cli.display import EventBars, megabytes, status
from am_memory.engines.base import Engine, Message
from am_memory.engines.names import EngineName
from am_memory.memory import Memory
from am_memory.policy import SINK_TOKENS, MemoryPolicy
from am_memory.session.session import Session

PLAIN = MemoryPolicy(trigger_tokens=1.0)
"""Compacts nothing within the model's window: a plain cache."""
MEMORY, TRUNCATED, EVERYTHING = "memory", "truncated to the same size", "everything kept"

SUBJECTS = [
    "The harbour master",
    "An old librarian",
    "The night train",
    "A travelling cook",
    "The market square",
    "A retired pilot",
    "The weather station",
    "The stone bridge",
    "A young surveyor",
    "The town council",
    "The ferry crew",
    "A quiet gardener",
    "The bakery",
    "A choir of teachers",
    "The lighthouse keeper",
    "The museum guard",
    "A group of cyclists",
    "The clock tower",
]
VERBS = [
    "kept a careful record of",
    "argued for years about",
    "was rebuilt beside",
    "took great pride in",
    "rarely spoke of",
    "borrowed money for",
    "painted a picture of",
    "had forgotten",
    "was known for",
    "wrote long letters about",
    "repaired",
    "lost interest in",
    "waited all winter for",
    "collected stories about",
    "mapped",
    "celebrated",
    "quietly ignored",
    "returned to",
]
OBJECTS = [
    "the changing tides",
    "the orchard behind the mill",
    "a collection of brass instruments",
    "the annual regatta",
    "the price of salt",
    "a cracked church bell",
    "the new railway timetable",
    "three generations of beekeepers",
    "the fog that came every autumn",
    "a library of sea charts",
    "the narrow road over the hills",
    "a recipe for rye bread",
    "the festival of lanterns",
    "an unfinished canal",
    "the swallows under the eaves",
    "a dispute over fishing rights",
    "the old observatory",
    "a garden of roses",
]
ENDS = [
    "when the first snow fell",
    "long after the war",
    "as everyone in the valley knew",
    "without ever saying why",
    "before the visitors arrived",
    "although nobody had asked",
    "while the river was high",
    "in the year of the comet",
    "to the surprise of the neighbours",
    "until the money ran out",
    "and the papers wrote about it",
    "despite the rain",
    "at the end of a dry summer",
    "on the advice of a stranger",
]
TOWNS = [
    "Lindholm",
    "Carrow",
    "Estmere",
    "Bastide",
    "Oldwick",
    "Tarnholt",
    "Pellmoor",
    "Vesper",
    "Quillon",
    "Marsden",
    "Halbrook",
    "Yarrowby",
    "Dunmere",
    "Fairlea",
    "Grenoch",
    "Ister",
    "Jorvale",
    "Kelmscot",
    "Larkhill",
    "Morwen",
    "Netherby",
    "Orsett",
    "Pinmill",
    "Rosedal",
    "Stanmoor",
    "Thorley",
    "Ulverton",
    "Wexcombe",
    "Ashgrove",
    "Brackley",
    "Corvane",
    "Denholm",
    "Elmstow",
    "Fenwick",
    "Galloway",
    "Harrowgate",
]


def prose(rng: random.Random, num_sentences: int) -> list[str]:
    """Sentences that no model has read before, about nothing in particular."""
    return [
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDS)}."
        for _ in range(num_sentences)
    ]


@dataclass(frozen=True)
class Fact:
    """A code that a text tells; `question` and `opening` are the turns that ask for it."""

    town: str
    code: str

    @property
    def told(self) -> str:
        return f"The access code of {self.town} is {self.code}."

    @property
    def question(self) -> str:
        return f"What is the access code of {self.town}?"

    @property
    def opening(self) -> str:
        return f"The access code of {self.town} is"


def facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts that cannot be guessed."""
    return [Fact(town, str(rng.randint(1000, 9999))) for town in rng.sample(TOWNS, count)]


def hide(rng: random.Random, told: Sequence[Fact], num_sentences: int) -> str:
    """Prose in which the facts lie at random places."""
    lines = prose(rng, num_sentences)
    places = sorted(rng.sample(range(num_sentences), len(told)), reverse=True)
    for place, fact in zip(places, reversed(told), strict=True):
        lines.insert(place, fact.told)
    return " ".join(lines)


@dataclass(frozen=True)
class Ship(Fact):
    """A fact that even the bundled model of 135 million parameters can look up: the number follows the name itself."""

    @property
    def told(self) -> str:
        return f"The ship {self.town} {self.code} came in."

    @property
    def question(self) -> str:
        return "Which ship was it?"

    @property
    def opening(self) -> str:
        return f"It was the ship {self.town}"


@dataclass(frozen=True)
class Letter:
    """A user's message, the answer to it, and the facts in it."""

    text: str
    facts: tuple[Fact, ...]

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.text}, {"role": "assistant", "content": "Thank you for the letter."}]


def letters(seed: int, num_letters: int, num_facts: int = 2, num_sentences: int = 9) -> list[Letter]:
    """A conversation's worth of letters, each of which names some ships."""
    rng = random.Random(seed)
    towns = iter(rng.sample(TOWNS, num_letters * num_facts))
    written = []
    for _ in range(num_letters):
        ships = tuple(Ship(next(towns), str(rng.randint(10, 99))) for _ in range(num_facts))
        written.append(Letter(hide(rng, ships, num_sentences), ships))
    return written


def question_text(engine: Engine, fact: Fact) -> str:
    """The turn that asks for a fact, after any complete turn, and the opening of its answer."""
    return asked_text(engine, fact.question, fact.opening)


def asked_text(engine: Engine, question: str, opening: str) -> str:
    """A question as a turn, after any complete turn, and the opening of its answer."""
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    asked = [*before, {"role": "user", "content": question}]
    return engine.render(asked, add_generation_prompt=True).removeprefix(engine.render(before)) + opening


def ask(session: Session, facts: Sequence[Fact]) -> dict[Fact, str]:
    """How the model completes the opening for each fact: as many tokens as the code has, greedily.

    The session stays as it was, and one question does not see another.
    """
    engine = session.engine
    questions = [engine.encode(question_text(engine, fact)) for fact in facts]
    columns = zip(*questions, strict=False)
    shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
    branch = session.fork(policy=PLAIN)
    branch.append(shared)
    answers = {}
    for fact, question in zip(facts, questions, strict=True):
        said: list[int] = []
        for _ in engine.encode(f" {fact.code}"):
            expected = branch.logits([*question[len(shared) :], *said, 0])[-1]
            said.append(int(expected.argmax()))
        answers[fact] = engine.decode(said).strip()
    return answers


def run_demo(
    console: Console, model: str, engine: EngineName, policy: MemoryPolicy, num_letters: int, seed: int
) -> None:
    """Read letters into a memory, live, then ask three readers for every fact in them."""
    bars = EventBars(console)
    with bars.showing(f"loading {model}"):
        memory = Memory.from_pretrained(model, engine=engine, policy=policy, on_event=bars)
    written = letters(seed, num_letters)
    console.print(introduction(model, memory, len(written)))
    session = memory.session("memory")
    ends = read_letters(console, bars, session, written, memory.trigger_tokens)

    cut_off, everything = (memory.session(name, policy=PLAIN) for name in (TRUNCATED, EVERYTHING))
    num_recent = round(session.stats.kv_tokens) - SINK_TOKENS
    with bars.showing():
        cut_off.append([*session.tokens[:SINK_TOKENS], *session.tokens[-num_recent:]])
        for number, letter in enumerate(written, 1):
            bars.step("the same letters into a plain cache", number, len(written))
            everything.append(letter.messages)
    readers = {MEMORY: session, TRUNCATED: cut_off, EVERYTHING: everything}
    answers = {}
    for name, reader in readers.items():
        with bars.showing(f"asking for every ship: {name}"):
            answers[name] = ask(reader, [fact for letter in written for fact in letter.facts])
    num_lost = sum(end <= ends[-1] - num_recent for end in ends)
    console.print(answers_table(written, answers))
    console.print(sizes_table(written, answers, readers, num_lost))


def read_letters(
    console: Console, bars: EventBars, session: Session, written: Sequence[Letter], trigger_tokens: int
) -> list[int]:
    """Read letter after letter, and show what happens; where in the conversation each of them ends, in tokens."""
    started, ends = time.perf_counter(), []
    for number, letter in enumerate(written, 1):
        told = " and ".join(f"ship {fact.town} {fact.code}" for fact in letter.facts)
        console.print(f"[bold]letter {number}[/] of {len(written)}: [green]{told}[/] in small talk")
        with bars.showing():
            session.append(letter.messages)
        ends.append(len(session.tokens))
        console.print(status(session), soft_wrap=True)
    console.print(f"[dim]{ends[-1]:,} tokens read in {time.perf_counter() - started:.0f} s[/]\n")
    return ends


def introduction(model: str, memory: Memory, num_letters: int) -> Panel:
    """What is going to happen."""
    policy = memory.policy
    name = "SmolLM2-135M-Instruct, the bundled model," if model == "demo" else Path(model).name
    return Panel(
        f"{name} reads {num_letters} letters. Its KV cache may hold [cyan]{memory.trigger_tokens}[/] tokens: whenever "
        f"it is full, its oldest {policy.compact_fraction:.0%} is compacted by Attention Matching, the exact tokens in "
        f"it to {policy.keep_ratio:.0%} of their number, and the reading goes on. Afterwards the model is asked for "
        "the ships that the letters named; so are two plain caches, one of the same size and one that kept everything.",
        title="am-memory demo",
        border_style="cyan",
    )


Answers = Mapping[str, Mapping[Fact, str]]
"""What each reader says of each fact."""


def answers_table(written: Sequence[Letter], answers: Answers) -> Table:
    """All that was said, letter by letter."""
    table = Table("letter", "told", *answers, title='"Which ship was it?" "It was the ship ..."')
    for number, letter in enumerate(written, 1):
        told = "  ".join(f"{fact.town} {fact.code}" for fact in letter.facts)
        cells = ("  ".join(mark(fact, said[fact]) for fact in letter.facts) for said in answers.values())
        table.add_row(str(number), told, *cells)
    return table


def mark(fact: Fact, said: str) -> str:
    return f"[green]✓ {said}[/]" if said == fact.code else f"[red]✗ {said or '-'}[/]"


def sizes_table(written: Sequence[Letter], answers: Answers, readers: Mapping[str, Session], num_lost: int) -> Table:
    """What each reader recalls, and what it takes; the first `num_lost` letters lie before what truncation keeps."""
    table = Table("", *readers, title="What is recalled, and what it takes")
    groups = {f"letters 1-{num_lost}": written[:num_lost], f"letters {num_lost + 1}-{len(written)}": written[num_lost:]}
    for title, some in groups.items():
        facts = [fact for letter in some for fact in letter.facts]
        counts = (sum(said[fact] == fact.code for fact in facts) for said in answers.values())
        table.add_row(f"ships recalled, {title}", *(f"[bold]{count}[/] of {len(facts)}" for count in counts))
    stats = [reader.stats for reader in readers.values()]
    table.add_row("tokens in the cache", *(f"{stat.kv_tokens:,.0f}" for stat in stats))
    table.add_row("bytes of the cache", *(megabytes(stat.kv_bytes) for stat in stats))
    table.add_row("compactions", *(str(stat.num_compactions) for stat in stats))
    return table
