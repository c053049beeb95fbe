"""What a comparison reads and asks: a text, a chat or letters of its own, and questions. Knows no model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from am_memory.cli.letters import letters
from am_memory.cli.options import text_of
from am_memory.errors import InvalidInput

if TYPE_CHECKING:
    from am_memory.engines.base import Message

READ = "I have read it."
PIECE_CHARS = 800
"""A text is read in messages of at most so many characters, some 200 tokens."""
ANSWER_WORDS = 3
"""Words that finish a sentence. More of them would ask for the model's style, not for what it knows."""
LEAST_WORDS = 10
"""A shorter sentence is not asked for."""
NUM_LETTERS = 7

Turn = tuple["Message", ...]


@dataclass(frozen=True)
class Question:
    """One question about a conversation.

    Attributes:
        accepted: the right answers; the log probability is that of the first one.
        opening: the words with which the answer begins, before the right answer itself; "" leaves them to the model.
    """

    question: str
    accepted: tuple[str, ...]
    opening: str = ""

    def is_right(self, answer: str) -> bool:
        """Whether the answer holds an accepted one, word by word; case, spaces and punctuation do not count."""
        said = f" {plain(answer)} "
        return any(f" {plain(one)} " in said for one in self.accepted)


@dataclass(frozen=True)
class Material:
    """A conversation to hold, how it goes on, and what is asked about it.

    Attributes:
        turns: each a message, or a message and its answer.
        continuation: the last message, which is not read; its tokens are predicted.
    """

    turns: tuple[Turn, ...]
    continuation: Message
    questions: tuple[Question, ...]


def plain(text: str) -> str:
    """The words of a text in lower case, with a space between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def of_letters(num_letters: int = NUM_LETTERS, seed: int = 0) -> Material:
    """Letters that no model has read; each names a ship, whose number is asked for."""
    *read, last = letters(seed, num_letters, num_facts=1)
    ships = [fact for letter in read for fact in letter.facts]
    questions = tuple(Question(ship.question, (ship.code,), ship.opening) for ship in ships)
    return Material(tuple(tuple(letter.messages) for letter in read), last.messages[0], questions)


def of_text(path: Path, num_questions: int) -> Material:
    """A text as a person pastes it into a chat, piece by piece. The last piece is the continuation.

    Raises:
        InvalidInput: the file cannot be read, or is too short.
    """
    *read, last = [*pieces(text_of(path))] or [""]
    if not read:
        raise InvalidInput(f"{path} has fewer than {PIECE_CHARS} characters: give a longer text, of some pages")
    turns = [({"role": "user", "content": piece}, {"role": "assistant", "content": READ}) for piece in read]
    return Material(tuple(turns), {"role": "user", "content": last}, to_finish(read, num_questions))


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, a sentence, or at least a word."""
    while text := text.strip():
        head = text[:PIECE_CHARS]
        ends = (head.rfind("\n"), head.rfind(". ") + 1, head.rfind(" "))
        cut = next((end for end in ends if end > PIECE_CHARS // 2), PIECE_CHARS)
        piece = text if len(text) <= PIECE_CHARS else text[:cut]
        yield piece.strip()
        text = text[len(piece) :]


def of_chat(path: Path, num_questions: int) -> Material:
    """A chat of one message a line, {"role": ..., "content": ...}, or all of them in one line's "messages".

    Raises:
        InvalidInput: the file cannot be read, a line is not such a message, or there are too few.
    """
    rows = [*json_lines(path)]
    if rows and "messages" in rows[0][1]:
        found = rows[0][1]["messages"]
        rows = [(rows[0][0], message) for message in found] if isinstance(found, list) else []
    *messages, last = [_message(path, line, row) for line, row in rows] or [{}]
    if not messages:
        raise InvalidInput(f'{path} has fewer than two messages: give one a line, {{"role": ..., "content": ...}}')
    texts = [str(message["content"]) for message in messages if message["role"] != "system"]
    return Material(tuple(turns_of(messages)), last, to_finish(texts, num_questions))


def _message(path: Path, line: int, row: object) -> Message:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("role", "content")):
        raise InvalidInput(f'{path}, line {line}: a message is {{"role": "user", "content": "text"}}')
    return {"role": row["role"], "content": row["content"]}


def turns_of(messages: Sequence[Message]) -> Iterator[Turn]:
    """Messages in turns: each user's message begins one."""
    turn: list[Message] = []
    for message in messages:
        if message["role"] == "user" and turn and turn[-1]["role"] != "system":
            yield tuple(turn)
            turn = []
        turn.append(message)
    yield tuple(turn)


def with_questions(material: Material, path: Path) -> Material:
    """The material with the questions of a file: one a line, {"question": ..., "answer": ..., "opening": ...}.

    "answer" is a text or a list of accepted texts; "opening" may be left out.

    Raises:
        InvalidInput: the file cannot be read, or a line is not such a question.
    """
    return replace(material, questions=tuple(_question(path, line, row) for line, row in json_lines(path)))


def _question(path: Path, line: int, row: Mapping[str, object]) -> Question:
    question, answer, opening = row.get("question"), row.get("answer"), row.get("opening", "")
    accepted = answer if isinstance(answer, list) else [answer]
    if not isinstance(question, str) or not isinstance(opening, str) or not accepted:
        raise InvalidInput(f'{path}, line {line}: a question is {{"question": "text", "answer": "text"}}')
    if not all(isinstance(one, str) and plain(one) for one in accepted):
        raise InvalidInput(f"{path}, line {line}: answer {answer!r} must be a text with words, or a list of such texts")
    return Question(question, tuple(map(str, accepted)), opening)


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Each line of a JSONL file with its number, from 1; empty lines are left out."""
    for number, line in enumerate(text_of(path).split("\n"), 1):  # JSON may hold other line ends
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}, line {number}: {error}: give one JSON object a line") from error
            if not isinstance(row, dict):
                raise InvalidInput(f"{path}, line {number}: {shown(row)} is not a JSON object")
            yield number, row


def shown(value: object) -> str:
    """A value of a file in an error, not too long."""
    return repr(value)[:60]


def to_finish(texts: Sequence[str], count: int) -> tuple[Question, ...]:
    """Questions that a text answers by itself: sentences all over it, of which the first half is given."""
    found = [question for text in texts for question in _sentences(text)]
    openings = [plain(question.opening) for question in found]
    whole = plain(" ".join(texts))
    once = [question for question, opening in zip(found, openings, strict=True) if whole.count(opening) == 1]
    step = max(len(once) / max(count, 1), 1)
    return tuple(once[int(number * step)] for number in range(min(count, len(once))))


def _sentences(text: str) -> Iterator[Question]:
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        words = sentence.split()
        if len(words) >= LEAST_WORDS:
            given, following = words[: len(words) // 2], words[len(words) // 2 :]
            opening = " ".join(given)
            question = f'Finish this sentence of mine, word for word: "{opening} ..."'
            yield Question(question, (" ".join(following[:ANSWER_WORDS]),), opening)
