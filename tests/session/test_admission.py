"""Which work of a batch goes on: parked sessions wait for a bounded time, and caches stay within their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from am_memory import Generation, Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.session.admission import Admission
from am_memory.session.batch import Batch

POLICY = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=32)


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


def answers_of(memory: Memory, number: int, *, text: str = "owl", max_new_tokens: int = 5) -> list[Generation]:
    answers = []
    for _ in range(number):
        session = memory.scratch()
        session.append(text)
        answers.append(session.generate(max_new_tokens))
    return answers


def bytes_at(answer: Generation, num_tokens: int) -> float:
    """Bytes of its cache with so many tokens."""
    cache = answer.context.cache
    return max(cache.exact_nbytes / cache.num_tokens * num_tokens, cache.nbytes)


def names(chosen: Sequence[object], works: Sequence[object]) -> list[int]:
    return [works.index(work) for work in chosen]


def test_a_parked_session_waits_for_those_before_it_and_not_for_those_after_it(memory: Memory) -> None:
    """On a full server there are never fewer answers, so that a parked one once waited for ever."""
    admission, works = Admission(), answers_of(memory, 6)
    assert names(admission.able(works[:3]), works) == [0, 1, 2]
    assert admission.park(works[1])
    assert names(admission.able([*works[:3], works[3]]), works) == [0, 2]
    assert names(admission.able([*works[1:5]]), works) == [1, 2]  # one has ended, and another one has come
    admission.unpark(works[1])
    assert names(admission.able(works[1:6]), works) == [1, 2, 3, 4, 5]


def test_the_last_one_is_not_parked(memory: Memory) -> None:
    """Nothing would ever free memory for it: it fails."""
    admission, works = Admission(), answers_of(memory, 2)
    admission.able(works)
    assert admission.park(works[0])
    assert names(admission.able(works), works) == [1]
    assert admission.park(works[1])
    assert names(admission.able(works), works) == [0]
    assert not admission.park(works[0])


def test_caches_count_with_the_bytes_that_they_reach(memory: Memory) -> None:
    """A session shrinks when it compacts: however long an answer is, it counts with its trigger."""
    short, long = answers_of(memory, 3, max_new_tokens=10), answers_of(memory, 3, max_new_tokens=10_000)
    bounded = Admission(int(2.5 * bytes_at(short[0], len(short[0].context.tokens) + 10)))
    assert names(bounded.able(short), short) == [0, 1]
    assert names(bounded.able(short[1:]), short) == [1, 2]
    bounded = Admission(int(2.5 * bytes_at(long[0], long[0].context.trigger_tokens)))
    assert names(bounded.able(long), long) == [0, 1]
    assert names(Admission(1).able(long), long) == [0]


def test_answers_beyond_the_bytes_wait_and_all_are_complete(memory: Memory) -> None:
    answers, most = answers_of(memory, 4), 0
    batch = Batch(int(2.5 * bytes_at(answers[0], len(answers[0].context.tokens) + 5)))
    counts = dict.fromkeys(answers, 0)
    while going := [answer for answer in answers if not answer.is_finished]:
        batch.step(going)
        ready = [answer for answer in going if answer.is_ready]
        most = max(most, len(ready))
        for answer in ready:
            next(answer)
            counts[answer] += 1
    assert most == 2
    assert [*counts.values()] == [5, 5, 5, 5]
