"""Asks every way to hold a conversation the same questions, and measures how it would go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from am_memory.cli.comparison.material import Material, Question
from am_memory.cli.comparison.ways import Held
from am_memory.cli.questions import GREEDY, open_answer, question_turn
from am_memory.engines.base import Message
from am_memory.session.session import Session

ANSWER_TOKENS = 40
"""Longest answer to a question without an opening."""
CONTINUATION_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """The answer to one question, with the largest size that the cache had meanwhile.

    Attributes:
        log_probability: of the whole right answer, in nats.
    """

    text: str
    is_right: bool
    log_probability: float
    kv_tokens: float
    kv_bytes: int
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """One row of a comparison.

    Attributes:
        num_right: of the questions.
        log_probability: of the right answers, mean in nats; None without questions.
        kl: mean over the continuation's tokens of KL(full cache || this row), in nats; nothing is recalled for it.
        kv_tokens: exact tokens and compact slots in the cache, at most while it was asked.
        kv_bytes: bytes of the cache then.
        seconds_to_read: with compactions or summaries.
        seconds_to_answer: one question, mean; None without questions.
    """

    name: str
    num_right: int
    log_probability: float | None
    kl: float
    kv_tokens: float
    kv_bytes: int
    seconds_to_read: float
    seconds_to_answer: float | None
    answers: tuple[Answer, ...]


class Judge:
    """Judges each way by the same continuation and the same questions.

    Args:
        full: a session with the full cache of the conversation.
        on_answer: called with the questions asked so far, and their number.
    """

    def __init__(self, full: Session, material: Material, on_answer: Callable[[int, int], None]) -> None:
        self._questions, self._on_answer = material.questions, on_answer
        self._continuation = continuation_of(full, material.continuation)
        self._expected = self._predicted(full)

    def judge(self, held: Held) -> Outcome:
        """Ask all questions, each on a branch of its own. The session stays as it was."""
        answers = []
        for number, question in enumerate(self._questions, 1):
            answers.append(answer(held.session.fork(), question))
            self._on_answer(number, len(self._questions))
        stats = held.session.stats
        return Outcome(
            name=held.name,
            num_right=sum(one.is_right for one in answers),
            log_probability=fmean(one.log_probability for one in answers) if answers else None,
            kl=divergence(self._expected, self._predicted(held.session)),
            kv_tokens=max([stats.kv_tokens, *(one.kv_tokens for one in answers)]),
            kv_bytes=max([stats.kv_bytes, *(one.kv_bytes for one in answers)]),
            seconds_to_read=held.seconds,
            seconds_to_answer=fmean(one.seconds for one in answers) if answers else None,
            answers=tuple(answers),
        )

    def _predicted(self, session: Session) -> Tensor:
        """Log probabilities, (num_tokens, vocab_size)."""
        return session.logits(self._continuation).log_softmax(-1)


def continuation_of(full: Session, message: Message) -> Sequence[int]:
    """The tokens that the message adds to the conversation, or the first of them."""
    branch = full.fork()
    branch.append([message])
    return branch.tokens[len(full.tokens) :][:CONTINUATION_TOKENS]


def divergence(full: Tensor, other: Tensor) -> float:
    """Mean over tokens of KL(full || other), in nats; both (num_tokens, vocab_size) log probabilities."""
    return max(float((full.exp() * (full - other)).sum(-1).mean()), 0.0)


def answer(branch: Session, question: Question) -> Answer:
    """Ask as a chat turn; what is looked up for the question is exact meanwhile. The branch ends with the answer.

    After an opening, the answer has as many tokens as the right one.
    """
    started, engine = time.perf_counter(), branch.engine
    if branch.messages:
        open_answer(branch, question.question)
    else:
        branch.append(question_turn(engine, question.question, ""))
    opening, right = engine.encode(question.opening), engine.encode(f" {question.accepted[0]}")
    logits = branch.logits([*opening, *right])[len(opening) :].log_softmax(-1)
    log_probability = float(logits[torch.arange(len(right)), torch.tensor(right)].sum())
    if opening:
        branch.append(opening)
    pieces, largest = list[str](), branch.stats
    for piece in branch.generate(len(right) if opening else ANSWER_TOKENS, GREEDY):
        pieces.append(piece.text)
        largest = max(largest, branch.stats, key=lambda stats: stats.kv_tokens)
    text = "".join(pieces).strip()
    return Answer(
        text=text,
        is_right=question.is_right(text),
        log_probability=log_probability,
        kv_tokens=largest.kv_tokens,
        kv_bytes=largest.kv_bytes,
        seconds=time.perf_counter() - started,
    )
