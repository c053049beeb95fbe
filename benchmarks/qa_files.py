"""Multiple-choice questions over documents, from the files of QuALITY and LongHealth. Knows no model.

QuALITY (arXiv:2112.08608), as its .train and .dev files are: a JSON object in each line, of which are read "article"
(text or HTML) and "questions", each with "question", "options" and "gold_label", the number of the right option from 1.
An article stands there twice, with the questions of two writers; it becomes one document. LongHealth
(arXiv:2401.14490): one JSON object of patients, of whom are read "texts" (name to text) and "questions", each with
"question", "answer_a" to "answer_e" and "correct", the right answer's text. Whatever else is there is left alone.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from am_memory.errors import InvalidInput

LETTERS = "ABCDE"
EXPECTED = (
    'expected lines of QuALITY, {"article", "questions": [{"question", "options", "gold_label"}]}, or one object of '
    'LongHealth, {patient: {"texts": {name: text}, "questions": [{"question", "answer_a" ... "answer_e", "correct"}]}}'
)
PARAGRAPH = re.compile(r"<(?:br|hr|/?(?:p|div|h[1-6]))\b[^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """`right` is the index of the right option."""

    text: str
    options: tuple[str, ...]
    right: int

    @property
    def asked(self) -> str:
        """The question as a turn, a line for each option."""
        lines = (f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return "\n".join([self.text, *lines, "Which answer is right?"])


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    questions: tuple[Question, ...]


class QualityQuestion(BaseModel):
    question: str
    options: list[str] = Field(min_length=2, max_length=len(LETTERS))
    gold_label: int = Field(ge=1)

    @model_validator(mode="after")
    def _label_is_there(self) -> QualityQuestion:
        if self.gold_label > len(self.options):
            raise ValueError(f"gold_label {self.gold_label} is above the {len(self.options)} options")
        return self

    def read(self) -> Question:
        return Question(self.question.strip(), tuple(map(str.strip, self.options)), self.gold_label - 1)


class Article(BaseModel):
    article: str = Field(min_length=1)
    questions: list[QualityQuestion]


class LongHealthQuestion(BaseModel):
    question: str
    answer_a: str
    answer_b: str
    answer_c: str
    answer_d: str
    answer_e: str
    correct: str

    @model_validator(mode="after")
    def _correct_is_an_answer(self) -> LongHealthQuestion:
        if self.correct.strip() not in self._answers:
            raise ValueError(f"correct {self.correct!r} is none of answer_a to answer_e")
        return self

    @property
    def _answers(self) -> tuple[str, ...]:
        answers = (self.answer_a, self.answer_b, self.answer_c, self.answer_d, self.answer_e)
        return tuple(map(str.strip, answers))

    def read(self) -> Question:
        return Question(self.question.strip(), self._answers, self._answers.index(self.correct.strip()))


class Patient(BaseModel):
    texts: dict[str, str] = Field(min_length=1)
    questions: list[LongHealthQuestion]


def load(path: str | Path) -> list[Document]:
    """Read a file of either format; its questions keep their order.

    Raises:
        InvalidInput: there is no such file, or it is of neither format.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read ({error}): give a text file of QuALITY or LongHealth") from error
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        whole = None
    is_longhealth = isinstance(whole, dict) and "article" not in whole
    name = Path(path).name
    documents = patients(whole, name) if is_longhealth else articles(content, name)
    if not documents:
        raise InvalidInput(f"{path} is empty: {EXPECTED}")
    return documents


def articles(content: str, file: str) -> list[Document]:
    """The lines of QuALITY, those of one article together; a document is called by its first line."""
    by_text: dict[str, tuple[str, list[Question]]] = {}
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            place = f"{file}, line {number}"
            article = checked(Article, line, place)
            _, questions = by_text.setdefault(plain_text(article.article), (place, []))
            questions += [question.read() for question in article.questions]
    return [Document(name, text, tuple(questions)) for text, (name, questions) in by_text.items()]


def patients(whole: dict[str, object], file: str) -> list[Document]:
    """The patients of LongHealth, each with all reports."""
    documents = []
    for patient_name, content in whole.items():
        name = f"{file}, {patient_name}"
        patient = checked(Patient, content, name)
        questions = tuple(question.read() for question in patient.questions)
        documents.append(Document(name, "\n\n".join(map(str.strip, patient.texts.values())), questions))
    return documents


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], content: object, place: str) -> Model:
    """JSON text, or what it holds, as a model; what is wrong with it as an error that names the place."""
    try:
        return model.model_validate_json(content) if isinstance(content, str) else model.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise InvalidInput(f"{', '.join(filter(None, (place, key)))}: {problem['msg']}; {EXPECTED}") from error


def plain_text(article: str) -> str:
    """An article without its HTML, if it has any: a line for each paragraph."""
    if not PARAGRAPH.search(article):
        return article.strip()
    text = PARAGRAPH.sub("\n", re.sub(r"\s+", " ", article))
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return re.sub(r"\s*\n\s*", "\n", text).strip()
