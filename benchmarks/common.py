"""What the benchmarks share: texts with facts hidden in them, statistics, and tables for docs/benchmarks.md."""

from __future__ import annotations

import json
import platform
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TOWNS = (
    "Lindholm Carrow Estmere Bastide Oldwick Tarnholt Pellmoor Vesper Quillon Marsden Halbrook Yarrowby Dunmere Fairlea "
    "Grenoch Ister Jorvale Kelmscot Larkhill Morwen Netherby Orsett Pinmill Rosedal Stanmoor Thorley Ulverton Wexcombe "
    "Ashgrove Brackley Corvane Denholm Elmstow Fenwick Galloway Harrowgate"
).split()

_SUBJECTS = (
    "The harbour master|An old librarian|The night train|A travelling cook|The market square|A retired pilot|The weather "
    "station|The stone bridge|A young surveyor|The town council|The ferry crew|A quiet gardener|The bakery|A choir of "
    "teachers|The lighthouse keeper|The museum guard|A group of cyclists|The clock tower"
).split("|")
_VERBS = (
    "kept a careful record of|argued for years about|was rebuilt beside|took great pride in|rarely spoke of|borrowed money "
    "for|painted a picture of|had forgotten|was known for|wrote long letters about|repaired|lost interest in|waited all "
    "winter for|collected stories about|mapped|celebrated|quietly ignored|returned to"
).split("|")
_OBJECTS = (
    "the changing tides|the orchard behind the mill|a collection of brass instruments|the annual regatta|the price of "
    "salt|a cracked church bell|the new railway timetable|three generations of beekeepers|the fog that came every "
    "autumn|a library of sea charts|the narrow road over the hills|a recipe for rye bread|the festival of lanterns|an "
    "unfinished canal|the swallows under the eaves|a dispute over fishing rights|the old observatory|a garden of roses"
).split("|")
_ENDS = (
    "when the first snow fell|long after the war|as everyone in the valley knew|without ever saying why|before the "
    "visitors arrived|although nobody had asked|while the river was high|in the year of the comet|to the surprise of the "
    "neighbours|until the money ran out|and the papers wrote about it|despite the rain|at the end of a dry summer|on the "
    "advice of a stranger"
).split("|")


def sentence(rng: random.Random) -> str:
    return f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} {rng.choice(_OBJECTS)} {rng.choice(_ENDS)}."


def prose(rng: random.Random, num_sentences: int) -> list[str]:
    return [sentence(rng) for _ in range(num_sentences)]


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
        return f"The access code of {self.town} is "


def facts(rng: random.Random, count: int) -> list[Fact]:
    return [Fact(town, str(rng.randint(1000, 9999))) for town in rng.sample(TOWNS, count)]


def hide(rng: random.Random, told: Sequence[Fact], num_sentences: int) -> str:
    """Prose in which the facts lie at random places."""
    lines = prose(rng, num_sentences)
    for place, fact in zip(sorted(rng.sample(range(num_sentences), len(told)), reverse=True), reversed(told), strict=True):
        lines.insert(place, fact.told)
    return " ".join(lines)


def kl_divergence(full: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(full || other); both (num_tokens, vocab_size) logits."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def mean_spread(values: Iterable[float], digits: int = 3) -> str:
    values = list(values)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def machine() -> str:
    """The machine, for the figures' caption."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write_json(path: str | None, content: object) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
