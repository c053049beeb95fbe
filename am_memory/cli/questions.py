"""Asks a session for facts that it has read: for the demo, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from am_memory.cli.letters import Fact
from am_memory.engines.base import Engine
from am_memory.policy import MemoryPolicy
from am_memory.session.session import Session
from am_memory.text.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
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


def open_answer(session: Session, question: str) -> None:
    """Ask as a chat turn, up to where the answer begins; what the memory looks up for it is exact from then on."""
    session.append([{"role": "user", "content": question}])
    first, *_ = session.generate(1, GREEDY)  # it opens the answer, and looks back before that
    session.rewind(len(session.tokens) - len(first.token_ids))


def ask(session: Session, facts: Sequence[Fact]) -> dict[Fact, str]:
    """Ask for each fact as a chat turn, and complete the opening of its answer by as many tokens as the code has.

    The session stays as it was, and no question sees another.
    """
    engine, answers = session.engine, dict[Fact, str]()
    for fact in facts:
        branch = session.fork()
        if branch.messages:
            open_answer(branch, fact.question)
            branch.append(fact.opening)
        else:
            branch.append(fact_turn(engine, fact))
        pieces = branch.generate(len(engine.encode(f" {fact.code}")), GREEDY)
        answers[fact] = engine.decode([token_id for piece in pieces for token_id in piece.token_ids]).strip()
    return answers
