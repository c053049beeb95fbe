"""The demonstration: letters full of small talk and a few facts, far longer than the cache, and what is left of them.

The same questions are asked of three readers: the memory, a plain cache that holds the same number of tokens (the
beginning of the conversation cut off), and a plain cache that holds everything.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from am_memory.display import EventBars, megabytes, status
from am_memory.engines.base import Engine
from am_memory.memory import Memory
from am_memory.policy import MemoryPolicy
from am_memory.sampling import Sampling
from am_memory.session import Session

SUBJECTS = (
    "The harbour master|An old librarian|The night train|A travelling cook|The market square|A retired pilot|The weather "
    "station|The stone bridge|A young surveyor|The town council|The ferry crew|A quiet gardener|The bakery|A choir of "
    "teachers|The lighthouse keeper|The museum guard|A group of cyclists|The clock tower"
).split("|")
VERBS = (
    "kept a careful record of|argued for years about|was rebuilt beside|took great pride in|rarely spoke of|borrowed money "
    "for|painted a picture of|had forgotten|was known for|wrote long letters about|repaired|lost interest in|waited all "
    "winter for|collected stories about|mapped|celebrated|quietly ignored|returned to"
).split("|")
OBJECTS = (
    "the changing tides|the orchard behind the mill|a collection of brass instruments|the annual regatta|the price of "
    "salt|a cracked church bell|the new railway timetable|three generations of beekeepers|the fog that came every "
    "autumn|a library of sea charts|the narrow road over the hills|a recipe for rye bread|the festival of lanterns|an "
    "unfinished canal|the swallows under the eaves|a dispute over fishing rights|the old observatory|a garden of roses"
).split("|")
ENDS = (
    "when the first snow fell|long after the war|as everyone in the valley knew|without ever saying why|before the "
    "visitors arrived|although nobody had asked|while the river was high|in the year of the comet|to the surprise of the "
    "neighbours|until the money ran out|and the papers wrote about it|despite the rain|at the end of a dry summer|on the "
    "advice of a stranger"
).split("|")
TOWNS = (
    "Lindholm Carrow Estmere Bastide Oldwick Tarnholt Pellmoor Vesper Quillon Marsden Halbrook Yarrowby Dunmere Fairlea "
    "Grenoch Ister Jorvale Kelmscot Larkhill Morwen Netherby Orsett Pinmill Rosedal Stanmoor Thorley Ulverton Wexcombe "
    "Ashgrove Brackley Corvane Denholm Elmstow Fenwick Galloway Harrowgate"
).split()


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
class Turn:
    """One letter and the facts in it."""

    text: str
    facts: tuple[Fact, ...]


def letters(seed: int, num_turns: int, num_facts: int = 2, num_sentences: int = 24) -> list[Turn]:
    """A conversation's worth of letters."""
    rng = random.Random(seed)
    told = facts(rng, num_turns * num_facts)
    groups = [tuple(told[number * num_facts : (number + 1) * num_facts]) for number in range(num_turns)]
    return [Turn(hide(rng, group, num_sentences), group) for group in groups]


def question_text(engine: Engine, fact: Fact) -> str:
    """The turn that asks for a fact, after any complete turn, and the opening of its answer."""
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    asked = [*before, {"role": "user", "content": fact.question}]
    return engine.render(asked, add_generation_prompt=True).removeprefix(engine.render(before)) + fact.opening


def answer(session: Session, fact: Fact) -> str:
    """What the model says when asked for a fact: as many tokens as the code has, greedily; on a scratch branch."""
    branch = session.fork()
    branch.append(question_text(session.engine, fact))
    num_tokens = len(session.engine.encode(f" {fact.code}"))
    return "".join(piece.text for piece in branch.generate(num_tokens, Sampling())).strip()


def truncated(memory: Memory, session: Session) -> Session:
    """A plain cache of the same physical size: the sinks and the last tokens, read anew without the rest."""
    size = round(session.stats.kv_tokens)
    num_sinks = 4
    window = memory.engine.info.window_tokens
    plain = memory.session(f"{session.name}, truncated", policy=MemoryPolicy(trigger_tokens=window))
    plain.append([*session.tokens[:num_sinks], *session.tokens[num_sinks - size :]])
    return plain


def run_demo(console: Console, model: str, policy: MemoryPolicy, num_turns: int, seed: int) -> None:
    """Read letters into a memory, live, then ask three readers for every fact in them."""
    bars = EventBars(console)
    with console.status(f"loading {model}"):
        memory = Memory.from_pretrained(model, policy=policy, on_event=bars)
    trigger = memory.trigger_tokens
    console.print(
        f"{memory.engine.info.name}: the cache may hold {trigger} tokens; at each trigger the oldest "
        f"{policy.compact_fraction:.0%} of it is compacted to {policy.keep_ratio:.0%} of its slots."
    )
    session, turns = memory.session("memory"), letters(seed, num_turns)
    everything = memory.session("everything", policy=MemoryPolicy(trigger_tokens=1.0))
    for number, turn in enumerate(turns, 1):
        told = ", ".join(f"{fact.town} {fact.code}" for fact in turn.facts)
        console.print(f"[bold]letter {number}[/] of {num_turns}, between small talk: [green]{told}[/]")
        messages = [{"role": "user", "content": turn.text}, {"role": "assistant", "content": "Thank you for the letter."}]
        with bars.progress:
            session.append(messages)
            everything.append(messages)
        console.print(status(session, trigger))
    with console.status("reading the end of it again, with a plain cache of the same size"):
        cut_off = truncated(memory, session)
    readers = {"memory": session, "truncated to the same size": cut_off, "everything kept": everything}
    with console.status("asking for every fact"):
        show_recall(console, readers, turns)


def show_recall(console: Console, readers: dict[str, Session], turns: Sequence[Turn]) -> None:
    """Ask every reader for every fact; a table by letter, and the sizes."""
    table = Table("letter", "fact", *readers, title="What is the access code of ...?")
    right = dict.fromkeys(readers, 0)
    for number, turn in enumerate(turns, 1):
        for fact in turn.facts:
            cells = []
            for name, reader in readers.items():
                said = answer(reader, fact)
                right[name] += said == fact.code
                cells.append(f"[green]{said}[/]" if said == fact.code else f"[red]{said}[/]")
            table.add_row(str(number), f"{fact.town} {fact.code}", *cells)
    console.print(table)
    sizes = Table("", *readers)
    num_facts = sum(len(turn.facts) for turn in turns)
    stats = [reader.stats for reader in readers.values()]
    sizes.add_row("recalled", *(f"{count} of {num_facts}" for count in right.values()))
    sizes.add_row("tokens of the conversation", *(f"{stat.logical_tokens}" for stat in stats))
    sizes.add_row("tokens in the cache", *(f"{stat.kv_tokens:.0f}" for stat in stats))
    sizes.add_row("bytes of the cache", *(megabytes(stat.kv_bytes) for stat in stats))
    sizes.add_row("compactions", *(f"{stat.num_compactions}" for stat in stats))
    console.print(sizes)
