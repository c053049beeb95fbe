"""Texts that no model has read, with facts in them that cannot be guessed: for the demo, tests and benchmarks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from am_memory.engines.base import Message

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
    """Sentences that no model has read before, without any facts."""
    return [
        f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDS)}."
        for _ in range(num_sentences)
    ]


@dataclass(frozen=True)
class Fact:
    """A code in a text, the question for it, and the opening of the answer."""

    town: str
    code: str

    @property
    def sentence(self) -> str:
        """The sentence that states the fact."""
        return f"The access code of {self.town} is {self.code}."

    @property
    def question(self) -> str:
        """The question for the fact."""
        return f"What is the access code of {self.town}?"

    @property
    def opening(self) -> str:
        """The opening of the answer; the code follows."""
        return f"The access code of {self.town} is"


def facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts that cannot be guessed, each of another town."""
    return [Fact(town, str(rng.randint(1000, 9999))) for town in rng.sample(TOWNS, count)]


def hide(rng: random.Random, facts: Sequence[Fact], num_sentences: int) -> str:
    """Prose with the facts at random places, in their order."""
    lines = prose(rng, num_sentences)
    positions = sorted(rng.sample(range(num_sentences), len(facts)), reverse=True)
    for position, fact in zip(positions, reversed(facts), strict=True):
        lines.insert(position, fact.sentence)
    return " ".join(lines)


@dataclass(frozen=True)
class Ship(Fact):
    """A fact that even a model of 135 million parameters can look up: the number directly follows the name."""

    @property
    def sentence(self) -> str:
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
        """The letter and the answer to it."""
        return [{"role": "user", "content": self.text}, {"role": "assistant", "content": "Thank you for the letter."}]


def letters(seed: int, num_letters: int, num_facts: int = 2, num_sentences: int = 9) -> list[Letter]:
    """Letters with some ships in each, no town twice."""
    rng = random.Random(seed)
    towns = iter(rng.sample(TOWNS, num_letters * num_facts))
    written = []
    for _ in range(num_letters):
        ships = tuple(Ship(next(towns), str(rng.randint(10, 99))) for _ in range(num_facts))
        written.append(Letter(hide(rng, ships, num_sentences), ships))
    return written
