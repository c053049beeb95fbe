"""The chats of `facts.py`: reading them, making them longer, and telling a right answer from a wrong one.

A file in `texts/facts/` holds turns, each a paragraph "User: ..." and a paragraph "Model: ...". After the paragraph
"Facts" comes a line for each fact: kind | question | opening of the answer | accepted answers | wrong answers. Answers
are separated by " ; ". The first one stands in the chat, letter for letter. An answer with " + " lists words that must
all be there, in any order. The wrong answers are optional: an earlier value of the same fact.

After the paragraph "Several places" comes a line for each question that no single turn answers: kind | question |
opening of the answer | accepted answers | places. The places are separated by " ; ". Each one stands in one turn of the
user, letter for letter, and all of them are needed for the answer. The answer itself need not stand in the chat.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from am_memory.cli.letters import prose
from am_memory.engines.base import Message

FOLDER = Path(__file__).parent / "texts" / "facts"
PAGE_SENTENCES = 16
WORD = re.compile(r"[a-z]+|\d+(?:\.\d+)?")
FACTS, PLACES = QUESTIONS = ("facts", "places")
IGNORED_WORDS = {"the", "a", "an"}


@dataclass(frozen=True)
class Fact:
    """Something that a person tells in one turn or in several, and the question for it.

    Attributes:
        turns: numbers of the turns that the answer needs, the oldest first.
        accepted: right answers. The first one is what the log probability is of.
        wrong: values that it had before.
    """

    kind: str
    turns: tuple[int, ...]
    question: str
    opening: str
    accepted: tuple[str, ...]
    wrong: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return self.accepted[0]

    def is_right(self, text: str) -> bool:
        """Whether the text names an accepted answer, and no wrong one after it."""
        words = normalised(text)
        right = max((last_place(words, answer) for answer in self.accepted), default=-1)
        return right >= 0 and right > max((last_place(words, answer) for answer in self.wrong), default=-1)

    def token_f1(self, text: str) -> float:
        """F1 of the words of the text and those of the accepted answer that is nearest to it."""
        return max(shared_words_f1(normalised(text), normalised(answer)) for answer in self.accepted)


@dataclass(frozen=True)
class Chat:
    """Turns of (user, model), and what is asked about them.

    Attributes:
        facts: each is told in one turn.
        places: each needs several turns.
    """

    name: str
    turns: tuple[tuple[str, str], ...]
    facts: tuple[Fact, ...]
    places: tuple[Fact, ...] = ()

    def asked(self, questions: str) -> tuple[Fact, ...]:
        """One of the two sets of `QUESTIONS`."""
        return {FACTS: self.facts, PLACES: self.places}[questions]

    def messages(self) -> list[tuple[Message, Message]]:
        return [
            ({"role": "user", "content": user}, {"role": "assistant", "content": model}) for user, model in self.turns
        ]

    def values(self) -> list[str]:
        """The answers as they stand in the chat, and the values that were true before."""
        return [value for fact in self.facts for value in (fact.answer, *fact.wrong)]

    def idle_turns(self, forbidden: Sequence[str] = ()) -> list[tuple[str, str]]:
        """The turns that tell no fact, and name nothing that is forbidden."""
        values = [*self.values(), *forbidden]
        return [turn for turn in self.turns if not any(value in text for value in values for text in turn)]


def normalised(text: str) -> list[str]:
    """Words and numbers in lower case, without accents, articles, ordinal endings or commas in numbers."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", plain)
    plain = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b(?: of\b)?", "", plain)
    return [word for word in WORD.findall(plain) if word not in IGNORED_WORDS]


def last_place(words: Sequence[str], answer: str) -> int:
    """Number of the word at which the answer last begins (its last part, if it has several); -1 if it is missing."""
    places = [_last_place_of_part(words, "".join(normalised(part))) for part in answer.split(" + ")]
    return -1 if -1 in places else max(places)


def _last_place_of_part(words: Sequence[str], part: str) -> int:
    """Where words in a row spell the part. Spaces do not count: "8mg" is "8 mg", and a phone number may have any."""
    for start in reversed(range(len(words))):
        spelled = ""
        for word in words[start:]:
            spelled += word
            if len(spelled) >= len(part):
                break
        if spelled == part:
            return start
    return -1


def shared_words_f1(words: Sequence[str], answer: Sequence[str]) -> float:
    """Twice the number of shared words over the number of all words, as question answering is scored."""
    return 2 * (Counter(words) & Counter(answer)).total() / max(len(words) + len(answer), 1)


def load(path: Path) -> Chat:
    """Read a chat.

    Raises:
        ValueError: a paragraph or a line is not as it should be, or an answer or a place does not stand in the chat.
    """
    talk, _, listed = path.read_text(encoding="utf-8").partition("\nFacts\n")
    told_once, _, told_apart = listed.partition("\nSeveral places\n")
    turns: list[tuple[str, str]] = []
    paragraphs = [paragraph.strip() for paragraph in talk.split("\n\n")]
    for user, model in zip(paragraphs[::2], paragraphs[1::2], strict=True):
        if not user.startswith("User: ") or not model.startswith("Model: "):
            raise ValueError(
                f"{path}: a turn needs 'User: ' and 'Model: ', here it is {user[:40]!r} and {model[:40]!r}"
            )
        turns.append((user.removeprefix("User: "), model.removeprefix("Model: ")))
    users = [user for user, _ in turns]
    facts = tuple(_fact(path, line, users) for line in told_once.splitlines() if line.strip())
    places = tuple(_several_places(path, line, users) for line in told_apart.splitlines() if line.strip())
    return Chat(path.stem, tuple(turns), facts, places)


def _fact(path: Path, line: str, users: Sequence[str]) -> Fact:
    (kind, question, opening), accepted, *wrong = _fields(path, line, (4, 5))
    return Fact(kind, (_last_turn(path, accepted[0], users),), question, opening, accepted, wrong[0] if wrong else ())


def _several_places(path: Path, line: str, users: Sequence[str]) -> Fact:
    (kind, question, opening), accepted, places = _fields(path, line, (5,))
    turns = sorted(_last_turn(path, place, users) for place in places)
    return Fact(kind, tuple(turns), question, opening, accepted)


def _fields(path: Path, line: str, counts: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The first three fields as they are, then the parts of each of the others."""
    fields = [field.strip() for field in line.split(" | ")]
    if len(fields) not in counts:
        raise ValueError(f"{path}: {line!r} has {len(fields)} fields, not {' or '.join(map(str, counts))}")
    return [tuple(fields[:3]), *(tuple(part.strip() for part in field.split(" ; ")) for field in fields[3:])]


def _last_turn(path: Path, text: str, users: Sequence[str]) -> int:
    found = [number for number, user in enumerate(users) if text in user]
    if not found:
        raise ValueError(f"{path}: nobody says {text!r} in the chat")
    return found[-1]


def load_all() -> list[Chat]:
    return [load(path) for path in sorted(FOLDER.glob("*.txt"))]


def lengthened(chat: Chat, others: Sequence[Chat], num_tokens: int, count_tokens: Callable[[str], int]) -> Chat:
    """The chat with turns that tell nothing spread between its own, until it has about `num_tokens` tokens.

    These are the other chats' idle turns first, then pages of an invented chronicle.
    """
    room = num_tokens - sum(count_tokens(user + model) for user, model in chat.turns)
    rng = random.Random(chat.name)
    idle = [turn for other in others if other.name != chat.name for turn in other.idle_turns(chat.values())]
    fillers: list[tuple[str, str]] = []
    while room > 0:
        page = "I am typing up the town's old chronicle. The next page: " + " ".join(prose(rng, PAGE_SENTENCES))
        fillers.append(idle[len(fillers)] if len(fillers) < len(idle) else (page, "Typed neatly. Go on."))
        room -= count_tokens("".join(fillers[-1]))
    rng.shuffle(fillers)
    turns: list[tuple[str, str]] = []
    moved: dict[int, int] = {}
    share = len(fillers) / len(chat.turns)
    for number, turn in enumerate(chat.turns):
        moved[number] = len(turns)
        turns += [turn, *fillers[round(number * share) : round((number + 1) * share)]]
    facts, places = (
        tuple(replace(fact, turns=tuple(moved[turn] for turn in fact.turns)) for fact in chat.asked(questions))
        for questions in QUESTIONS
    )
    return Chat(chat.name, tuple(turns), facts, places)
