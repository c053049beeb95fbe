"""Asks a session for facts that it has read: for the demo, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from am_memory.cli.letters import Fact
from am_memory.engines.base import Engine
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Session

PLAIN = MemoryPolicy(trigger_tokens=1.0)
"""A plain cache: it compacts nothing within the model's context window."""


def fact_turn(engine: Engine, fact: Fact) -> str:
    """The turn that asks for a fact, and the opening of its answer. It can follow any complete turn."""
    return question_turn(engine, fact.question, fact.opening)


def question_turn(engine: Engine, question: str, opening: str) -> str:
    """A question as a turn, and the opening of its answer. It can follow any complete turn."""
    before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
    asked = [*before, {"role": "user", "content": question}]
    return engine.render(asked, add_generation_prompt=True).removeprefix(engine.render(before)) + opening


def ask(session: Session, facts: Sequence[Fact]) -> dict[Fact, str]:
    """Complete the opening for each fact greedily, by as many tokens as the code has.

    The session stays as it was, and no question sees another.
    """
    engine = session.engine
    questions = [engine.encode(fact_turn(engine, fact)) for fact in facts]
    columns = zip(*questions, strict=False)
    shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]
    branch = session.fork(policy=PLAIN)
    branch.append(shared)
    answers = {}
    for fact, question in zip(facts, questions, strict=True):
        answer: list[int] = []
        for _ in engine.encode(f" {fact.code}"):
            logits = branch.logits([*question[len(shared) :], *answer, 0])[-1]
            answer.append(int(logits.argmax()))
        answers[fact] = engine.decode(answer).strip()
    return answers
