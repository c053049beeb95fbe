"""The trial: each answer stands in its chat once, and is found there."""

from __future__ import annotations

from am_memory.engines.transformers import TransformersEngine
from am_memory.queries.trial import trial


def test_the_trial_has_each_answer_once() -> None:
    chat, questions = "\n\n".join(trial().chat), trial().questions
    assert {answer: chat.count(answer) for _, answer in questions} == {answer: 1 for _, answer in questions}
    assert len({question for question, _ in questions}) == len(questions)


def test_the_trial_finds_where_its_answers_stand(engine: TransformersEngine) -> None:
    token_ids = trial().encoded(engine)
    written = [engine.decode(token_ids[start:end]) for start, end in trial().places(engine, token_ids)]
    assert written == [answer for _, answer in trial().questions]
