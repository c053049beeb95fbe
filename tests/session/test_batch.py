"""Several answers at the same time: each is what it would be alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import count, islice, pairwise
from random import Random
from threading import Event as Signal
from threading import Thread, get_ident
from typing import Any

import pytest
import torch
from inside import context_of, state_of
from torch import Tensor

from am_memory import Generation, Memory, MemoryPolicy, Piece, Sampling, Session
from am_memory.compaction.job import CompactionJob
from am_memory.engines import partwise
from am_memory.engines.base import SessionCache
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidInput, UnsupportedOperation
from am_memory.events import CompactionFinished, CompactionStarted, Event
from am_memory.session import jobs
from am_memory.session.appending import add, encode, read
from am_memory.session.batch import Batch
from am_memory.session.reading import PromptReading
from am_memory.text.constraints import regex

POLICY = MemoryPolicy(trigger_tokens=120, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=32)
TEXTS = [
    f"{word} and what came of it. " * times for word, times in zip(["owl", "moon", "tea", "bread", "sea"], count(1))
]
TOKENS = 70


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


def sessions_of(memory: Memory, *, policy: MemoryPolicy | None = None) -> list[Session]:
    """Sessions of different lengths; some are compacted already."""
    sessions = []
    for number, text in enumerate(TEXTS):
        session = memory.session(f"s{number}", policy=policy)
        session.append(text if number % 2 else [{"role": "user", "content": text}])
        sessions.append(session)
    return sessions


def answers_of(sessions: Sequence[Session]) -> list[Generation]:
    """Answers that differ in how they are chosen."""
    engine = sessions[0].engine
    return [
        sessions[0].generate(TOKENS),
        sessions[1].generate(TOKENS, Sampling(temperature=1.0, seed=7)),
        sessions[2].generate(TOKENS, None, regex(engine, "[a-z ]{30}")),
        sessions[3].generate(TOKENS // 2, Sampling(repetition_penalty=1.3), top_logprobs=2),
        sessions[4].generate(TOKENS, Sampling(temperature=0.8, top_k=20, seed=3, stop=("xyz",))),
    ]


def pieces_alone(engine: TransformersEngine) -> list[list[Piece]]:
    """The pieces of these answers, each generated alone."""
    return [list(answer) for answer in answers_of(sessions_of(Memory(engine, POLICY)))]


def together(memory: Memory, answers: Sequence[Generation]) -> list[list[Piece]]:
    pieces: dict[int, list[Piece]] = {id(answer): [] for answer in answers}
    for answer, piece in memory.generate_many(answers):
        pieces[id(answer)].append(piece)
    return list(pieces.values())


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def assert_same(pieces: Sequence[Sequence[Piece]], expected: Sequence[Sequence[Piece]]) -> None:
    assert [tokens_of(each) for each in pieces] == [tokens_of(each) for each in expected]
    for ours, theirs in zip(pieces, expected, strict=True):
        assert "".join(piece.text for piece in ours) == "".join(piece.text for piece in theirs)
        assert [piece.finish_reason for piece in ours] == [piece.finish_reason for piece in theirs]
        logprobs = [[one.logprob for piece in each for one in piece.logprobs] for each in (ours, theirs)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)


def assert_same_sessions(sessions: Sequence[Session], others: Sequence[Session]) -> None:
    for session, other in zip(sessions, others, strict=True):
        assert session.tokens == other.tokens
        assert session.messages == other.messages
        assert session.segments == other.segments
        assert [record.at_tokens for record in context_of(session).records] == [
            record.at_tokens for record in context_of(other).records
        ]
        torch.testing.assert_close(session.logits("hoo"), other.logits("hoo"), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"ahead_tokens": 12}, {"originals": "host"}, {"reference_queries": ("live",)}, {"originals": "drop"}],
    ids=str,
)
def test_each_answer_is_what_it_is_alone(
    engine: TransformersEngine, changes: dict[str, object], looking_back: None
) -> None:
    """Through compactions, recall, sampling, constraints and log probabilities."""
    policy = POLICY.with_changes(**changes)
    theirs = sessions_of(Memory(engine, policy))
    expected = [list(answer) for answer in answers_of(theirs)]
    memory = Memory(engine, policy)
    ours = sessions_of(memory)
    assert_same(together(memory, answers_of(ours)), expected)
    if not policy.ahead_tokens:  # else a compaction may be swapped in some tokens later or sooner
        assert_same_sessions(ours, theirs)
    assert max(session.stats.num_compactions for session in ours) > 1


def test_an_unread_prompt_is_read_between_the_tokens_of_others(engine: TransformersEngine) -> None:
    """Nobody waits for longer than a part of a chunk."""
    roomy, text = POLICY.with_changes(trigger_tokens=2000), "The sea is wide, and the owl does not swim in it. " * 6
    memory, other = Memory(engine, POLICY), Memory(engine, POLICY)
    sessions, others = sessions_of(memory, policy=roomy)[:2], sessions_of(other, policy=roomy)[:2]
    late, expected_late = memory.session("late"), other.session("late")
    late.append(text, read_now=False)
    read: list[int] = []
    answers = [*(session.generate(80) for session in sessions), late.generate(10)]
    pieces: list[list[Piece]] = [[], [], []]
    for answer, piece in memory.generate_many(answers):
        pieces[answers.index(answer)].append(piece)
        if answer is answers[0]:
            read.append(context_of(late).cache.num_tokens)
    steps = [after - before for before, after in zip(read, read[1:], strict=False)]
    assert max(steps) <= 16  # a quarter of a chunk, or the short end of the prompt
    expected_late.append(text)
    expected = [list(session.generate(80)) for session in others] + [list(expected_late.generate(10))]
    assert_same(pieces, expected)
    assert_same_sessions([late], [expected_late])


def test_a_prompt_that_is_read_beside_answers_is_read_in_parts(memory: Memory) -> None:
    """Others wait for no longer than a part of a chunk; without them, it is read by whole chunks."""
    sessions, late = sessions_of(memory)[:2], memory.session("late")
    late.append(TEXTS[4] * 2, read_now=False)
    left = [read(late)]
    with closing(memory.generate_many([session.generate(9) for session in sessions])) as steps:  # type: ignore[type-var]
        next(steps)
        left += [read(late), read(late)]
    left.append(read(late))
    assert [before - after for before, after in pairwise(left)] == [8, 8, 32]


def test_a_prompt_that_compacts_stops_no_other_answer(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device thread of the server once read and compacted a prompt, while all others waited."""
    sessions, late = sessions_of(memory)[:2], memory.scratch()
    add(late, encode(late, "The sea is wide, and the owl does not swim in it. " * 8))
    others, reading = [session.generate(200) for session in sessions], PromptReading(late)
    release, run = Signal(), CompactionJob.run

    def held(job: CompactionJob, *args: object) -> object:
        if job.tokens[:9] == late.tokens[:9]:
            assert release.wait(60)
        return run(job, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CompactionJob, "run", held)
    batch, left, given = Batch(), [reading.num_left], count()
    while not reading.is_finished:
        batch.step([reading, *others])
        if reading.is_ready:
            left.append(next(reading))
        given_now = [next(answer) for answer in others if answer.is_ready]
        is_held = context_of(late).background_compaction is not None and not release.is_set()
        if is_held and next(given) > 20:
            assert given_now, "the others go on while the compaction is held"
            release.set()
    assert release.is_set(), "nothing was compacted"
    assert all(before - after <= 32 for before, after in pairwise(left))
    assert late.stats.num_compactions > 0
    for each in others:
        each.close()
    expected = memory.scratch()
    expected.append("The sea is wide, and the owl does not swim in it. " * 8)
    assert_same([list(late.generate(9))], [list(expected.generate(9))])


def test_a_step_does_not_wait_for_the_end_of_a_compaction(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes the steps may have other work; and the events come when they happen."""
    session, release, run = memory.scratch(), Signal(), CompactionJob.run
    session.append(TEXTS[0])
    answer = session.generate(200)

    def held(job: CompactionJob, *args: object) -> object:
        assert release.wait(60)
        return run(job, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CompactionJob, "run", held)
    batch, started = Batch(), False
    for _ in range(400):
        batch.step([answer])
        if answer.is_ready:
            next(answer)
        elif any(isinstance(event, CompactionStarted) for event in answer.unsent):
            assert answer.has_news
            started = True
            break
    assert started
    seen: list[Event] = []
    with memory.listening(seen.append):
        answer.close()
    assert [type(event) for event in seen] == [CompactionStarted]
    release.set()


def test_compactions_are_made_one_at_a_time_beside_the_others(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background: the others get their tokens meanwhile."""
    running, most = set[int](), [0]
    sessions = sessions_of(memory)
    start = type(context_of(sessions[0])).start_background_compaction

    def counted(context: object) -> None:
        start(context)  # type: ignore[arg-type]
        running.add(id(context))

    monkeypatch.setattr(type(context_of(sessions[0])), "start_background_compaction", counted)
    for _ in memory.generate_many([session.generate(100) for session in sessions]):
        ahead = [context_of(session).background_compaction for session in sessions]
        most[0] = max(most[0], sum(each is not None and not each.is_done for each in ahead))
    assert running
    assert most[0] <= 1


def test_a_failing_answer_leaves_the_others_as_they_are(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pieces_alone(engine)
    sessions = sessions_of(memory)
    answers = answers_of(sessions)
    constraint = answers[2].constraint
    assert constraint is not None
    accept, tokens = constraint.accept, count()

    def fail_at_the_fifth(token_id: int) -> None:
        if next(tokens) == 4:
            raise InvalidInput("the constraint is broken")
        accept(token_id)

    monkeypatch.setattr(constraint, "accept", fail_at_the_fifth)
    pieces: list[list[Piece]] = [[] for _ in answers]
    with pytest.raises(InvalidInput, match="the constraint is broken"):
        for answer, piece in memory.generate_many(answers):
            pieces[answers.index(answer)].append(piece)
    assert isinstance(answers[2].error, InvalidInput)
    assert tokens_of(pieces[2]) == tokens_of(expected[2])[:4] == list(sessions[2].tokens[-4:])
    del pieces[2], expected[2]
    assert_same(pieces, expected)


@pytest.mark.parametrize("error", [RuntimeError("boom"), torch.OutOfMemoryError("no memory")], ids=str)
def test_a_step_that_fails_is_read_one_by_one(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Some layers have read their tokens then."""
    expected = pieces_alone(engine)
    sessions, calls = sessions_of(memory), count(1)
    attend = "am_memory.engines.transformers.attention.partwise.attend"
    forward_batch, real = engine.forward_batch, partwise.attend

    def failing_now_and_then(caches: Sequence[SessionCache], *args: object) -> Tensor | None:
        if next(calls) % 3:
            return forward_batch(caches, *args)  # type: ignore[arg-type]
        left, thread = count(), get_ident()

        def attend_some(*args: object) -> object:
            if get_ident() == thread and next(left) == 7:  # a compaction in the background attends as well
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(attend, attend_some)
            return forward_batch(caches, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "forward_batch", failing_now_and_then)
    assert_same(together(memory, answers_of(sessions)), expected)


def test_an_answer_without_memory_waits_until_there_are_fewer(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pieces_alone(engine)
    sessions = sessions_of(memory)
    answers = answers_of(sessions)
    poor, forward = context_of(sessions[1]).cache, engine.forward

    def read(cache: SessionCache, *args: object, **kwargs: object) -> Tensor:
        if cache is poor and sum(not answer.is_finished for answer in answers) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward(cache, *args, **kwargs)  # type: ignore[arg-type]

    def read_batch(caches: Sequence[SessionCache], *args: object) -> Tensor | None:
        if poor in caches and len(caches) > 2:
            raise torch.OutOfMemoryError("no memory")
        return forward_batch(caches, *args)  # type: ignore[arg-type]

    forward_batch = engine.forward_batch
    monkeypatch.setattr(engine, "forward", read)
    monkeypatch.setattr(engine, "forward_batch", read_batch)
    assert_same(together(memory, answers), expected)


def test_an_answer_that_never_has_memory_fails(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = sessions_of(memory)[:2]

    def read(*args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine, "forward", read)
    monkeypatch.setattr(engine, "forward_batch", read)
    before = [state_of(session) for session in sessions]
    answers = [session.generate(5) for session in sessions]
    with pytest.raises(torch.OutOfMemoryError):
        list(memory.generate_many(answers))
    assert all(answer.error for answer in answers)
    assert [state_of(session) for session in sessions] == before


@pytest.mark.parametrize("work", ["read", "compact"])
def test_a_prompt_or_a_compaction_without_memory_waits_until_there_are_fewer(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """It is not the long work alone that fails: the tokens of the others take memory too."""
    short, long = memory.session("short"), memory.session("long")
    short.append("owl")
    long.append(TEXTS[4] * 2, read_now=False)
    answers = [short.generate(40), long.generate(3)]
    context, tries = context_of(long), count()
    real = getattr(type(context), work)

    def poor(self: object, *args: object) -> object:
        if self is context and not answers[0].is_finished:
            next(tries)
            raise torch.OutOfMemoryError("no memory")
        return real(self, *args)

    monkeypatch.setattr(type(context), work, poor)
    monkeypatch.setattr(type(context), "start_background_compaction", lambda context: context.compact())
    pieces = together(memory, answers)
    assert next(tries) > 0, "it never ran out of memory"
    assert [len(tokens_of(each)) for each in pieces] == [40, 3]


def test_an_answer_whose_step_cannot_begin_fails_alone(memory: Memory, engine: TransformersEngine) -> None:
    """A constraint of a user's own may fail wherever it is called."""
    sessions = sessions_of(memory)[:3]
    constraint = regex(engine, "[a-z ]{30}")

    def broken() -> object:
        raise RuntimeError("no state")

    constraint.state = broken  # type: ignore[method-assign]
    answers = [sessions[0].generate(5), sessions[1].generate(5, None, constraint), sessions[2].generate(5)]
    with pytest.raises(RuntimeError, match="no state"):
        list(memory.generate_many(answers))
    assert [answer.num_tokens for answer in answers] == [5, 0, 5]
    assert all(context_of(session).notify == memory._notify for session in sessions)


def test_a_step_that_fails_as_a_whole_fails_every_answer(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread that makes the steps ends, and nobody waits for ever."""
    sessions = sessions_of(memory)[:2]
    before = [state_of(session) for session in sessions]
    answers = [session.generate(5) for session in sessions]

    def broken(steps: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("am_memory.session.batch._logits", broken)
    Batch().step(answers)
    for answer in answers:
        with pytest.raises(RuntimeError, match="boom"):
            next(answer)
    assert [state_of(session) for session in sessions] == before


def test_a_listener_that_raises_ends_its_answer_alone(engine: TransformersEngine) -> None:
    """The session keeps the tokens that were given out, and no others."""

    def listen(event: Event) -> None:
        if isinstance(event, CompactionFinished) and event.session == "s1" and is_told:
            raise RuntimeError("no ear")

    is_told = False
    memory = Memory(engine, POLICY, on_event=listen)
    sessions = sessions_of(memory)
    answers, is_told = [session.generate(100) for session in sessions], True
    start, given = list(sessions[1].tokens), list[int]()
    with pytest.raises(RuntimeError, match="no ear"):
        for answer, piece in memory.generate_many(answers):
            if answer is answers[1]:
                given += piece.token_ids
    assert [answer.error is None for answer in answers] == [True, False, True, True, True]
    assert list(sessions[1].tokens) == start + given
    assert all(answer.is_finished for answer in answers)


def test_a_failing_compaction_ends_its_answer_alone(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = sessions_of(memory)
    next_compaction = jobs.next_compaction

    def failing(context: Any, *args: Any) -> object:
        if context is context_of(sessions[3]):
            raise CompactionFailed("boom")
        return next_compaction(context, *args)

    monkeypatch.setattr(jobs, "next_compaction", failing)
    answers = [session.generate(80) for session in sessions]
    with pytest.raises(CompactionFailed, match="boom"):
        together(memory, answers)
    assert [answer.error is None for answer in answers] == [True, True, True, False, True]
    assert all(len(session.tokens) > 80 for session in sessions if session is not sessions[3])


def test_stopping_keeps_what_was_given_out(memory: Memory) -> None:
    sessions = sessions_of(memory)
    before = [session.tokens for session in sessions]
    answers = [session.generate(50) for session in sessions]
    given: dict[str, list[int]] = {session.name: [] for session in sessions}
    steps = memory.generate_many(answers)
    for number, (answer, piece) in enumerate(steps):
        given[answer.name] += piece.token_ids
        if number == 12:
            break
    steps.close()  # type: ignore[attr-defined]
    assert [len(each) for each in given.values()] == [3, 3, 3, 2, 2]
    for session, tokens in zip(sessions, before, strict=True):
        opened = session.tokens[len(tokens) :]
        assert list(opened[len(opened) - len(given[session.name]) :]) == given[session.name]
        assert list(session.generate(1))


def test_one_answer_may_be_closed(memory: Memory) -> None:
    sessions = sessions_of(memory)
    answers = [session.generate(30) for session in sessions]
    counts = dict.fromkeys(answers, 0)
    for answer, _ in memory.generate_many(answers):
        counts[answer] += 1
        if counts[answers[1]] == 3:
            answers[1].close()
    assert counts[answers[1]] == 3
    assert min(counts[answer] for answer in answers if answer is not answers[1]) > 20  # one may end its turn
    assert answers[1].is_finished
    assert answers[1].error is None


def test_another_thread_may_close_an_answer(
    memory: Memory, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step, too: the token of that step is taken back."""
    sessions, calls, forward_batch = sessions_of(memory)[:3], count(1), engine.forward_batch
    answers = [session.generate(12) for session in sessions]
    thread = Thread(target=answers[1].close)

    def closed_meanwhile(*args: object) -> Tensor | None:
        if next(calls) == 3:
            thread.start()
            thread.join(0.2)
        return forward_batch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "forward_batch", closed_meanwhile)
    start, given = list(sessions[1].tokens), list[int]()
    counts = dict.fromkeys(answers, 0)
    for answer, piece in memory.generate_many(answers):
        counts[answer] += 1
        if answer is answers[1]:
            given += piece.token_ids
        if counts[answers[0]] == 3 and answer is answers[0]:
            thread.join(10)
    assert list(counts.values()) == [12, 2, 12]
    assert answers[1].is_finished
    assert list(sessions[1].tokens) == start + given


def test_a_session_has_one_answer_at_a_time(memory: Memory, engine: TransformersEngine) -> None:
    session, alone = memory.session(), memory.session()
    for each in (session, alone):
        each.append([{"role": "user", "content": "owl"}])
    expected = list(alone.generate(3))
    with pytest.raises(InvalidInput, match="has two answers here"):
        list(memory.generate_many([session.generate(3), session.generate(3)]))
    with pytest.raises(InvalidInput, match="belongs to another memory"):
        list(Memory(engine, POLICY).generate_many([session.generate(3)]))
    first, second = session.generate(3), session.generate(3)
    Batch().step([first, second])
    with pytest.raises(UnsupportedOperation, match="two answers in one batch"):
        next(second)
    assert_same([list(first)], [expected])
    assert session.tokens == alone.tokens


def test_answers_have_constraints_of_their_own(memory: Memory, engine: TransformersEngine) -> None:
    """A constraint follows one answer; with two, each would be held to what the other has written."""
    constraint = regex(engine, "[a-z ]{30}")
    answers = [session.generate(5, None, constraint) for session in sessions_of(memory)[:2]]
    with pytest.raises(InvalidInput, match="another answer's constraint"):
        list(memory.generate_many(answers))


def test_a_session_that_was_used_meanwhile_ends_its_answer(memory: Memory) -> None:
    sessions = sessions_of(memory)[:3]
    answers = [session.generate(20) for session in sessions]
    counts = dict.fromkeys(answers, 0)
    with pytest.raises(UnsupportedOperation, match="changed while it was generating"):
        for answer, _ in memory.generate_many(answers):
            counts[answer] += 1
            if counts[answers[2]] == 2:
                sessions[2].append("!")
    assert list(counts.values()) == [20, 20, 2]


def test_events_are_those_of_the_answers(engine: TransformersEngine) -> None:
    events: list[Event] = []
    memory = Memory(engine, POLICY, on_event=events.append)
    sessions = sessions_of(memory)
    together(memory, [session.generate(60) for session in sessions])
    for session in sessions:
        made = [event for event in events if isinstance(event, CompactionFinished) and event.session == session.name]
        assert len(made) == session.stats.num_compactions
    assert all(context_of(session).notify == memory._notify for session in sessions)


def test_an_engine_that_cannot_batch_reads_one_by_one(
    engine: TransformersEngine, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pieces_alone(engine)
    monkeypatch.setattr(engine, "forward_batch", lambda *args: None)
    assert_same(together(memory, answers_of(sessions_of(memory))), expected)


def test_forks_generate_beside_their_session(memory: Memory, engine: TransformersEngine) -> None:
    """They share tails and slots until they differ."""
    sessions = [memory.session("one"), Memory(engine, POLICY).session("one")]
    for session in sessions:
        session.append(TEXTS[4])
    ours, theirs = ([session, session.fork(), session.fork()] for session in sessions)
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    expected = [list(fork.generate(40, sampling)) for fork, sampling in zip(theirs, samplings, strict=True)]
    answers = [fork.generate(40, sampling) for fork, sampling in zip(ours, samplings, strict=True)]
    assert_same(together(memory, answers), expected)


@pytest.mark.parametrize("seed", range(2))
def test_random_operations(engine: TransformersEngine, seed: int) -> None:
    """Eight sessions append, rewind and generate together, and twins of them alone: nothing is lost, nothing crosses."""
    rng = Random(seed)
    memory, other = Memory(engine, POLICY), Memory(engine, POLICY)
    ours, twins = sessions_of(memory), sessions_of(other)
    for _ in range(3):
        parent = rng.randrange(5)
        ours.append(ours[parent].fork())
        twins.append(twins[parent].fork())
    for _ in range(6):
        for session, twin in zip(ours, twins, strict=True):
            text, last = rng.choice(TEXTS), len(session.tokens)
            if rng.random() < 0.4:
                session.append(text, read_now=rng.random() < 0.5)
                twin.append(text)
            elif rng.random() < 0.5:
                num_tokens = rng.randrange(max(last - 30, 1), last + 1)
                session.rewind(num_tokens)
                twin.rewind(num_tokens)
        chosen = rng.sample(range(8), rng.randrange(2, 9))
        samplings = [Sampling(temperature=1.0, seed=rng.randrange(99)) for _ in chosen]
        answers = {row: ours[row].generate(30, sampling) for row, sampling in zip(chosen, samplings, strict=True)}
        given = {row: list[int]() for row in chosen}
        last_step = rng.randrange(1, 40) * len(chosen)
        with closing(memory.generate_many(answers.values())) as steps:  # type: ignore[type-var]
            for number, (answer, piece) in enumerate(steps):
                given[next(row for row in chosen if answers[row] is answer)] += piece.token_ids
                if number == last_step:
                    break
                if rng.random() < 0.01:
                    answers[rng.choice(chosen)].close()
        for row, sampling in zip(chosen, samplings, strict=True):
            alone = islice(twins[row].generate(30, sampling), len(given[row]))
            assert tokens_of(list(alone)) == given[row]
        assert [session.tokens for session in ours] == [twin.tokens for twin in twins]
    for session in ours:
        session.logits("hoo")  # reads what is left to be read
    assert max(session.stats.num_compactions for session in ours) > 1
    assert_same_sessions(ours, twins)


def new_scenes(memory: Memory) -> Callable[[], list[Session]]:
    first = sessions_of(memory)
    return lambda: [session.fork() for session in first]


def test_an_interrupt_anywhere_leaves_every_session_whole(memory: Memory) -> None:
    """Eight answers with forks: each session is as it was before the step, or as after it, and goes on."""
    from interrupts import interrupted_at, is_free

    fork_all = new_scenes(memory)

    def run(sessions: Sequence[Session], given: dict[str, list[int]]) -> None:
        steps = memory.generate_many([each.generate(40) for each in sessions])
        try:
            for number, (answer, piece) in enumerate(steps):
                given.setdefault(answer.name, []).extend(piece.token_ids)
                if number == 60:
                    return
        finally:
            steps.close()  # type: ignore[attr-defined]

    whole: dict[str, list[int]] = {}
    sessions = fork_all()
    with interrupted_at(None, everywhere=False) as lines:
        run(sessions, whole)
    for place in range(1, lines[0], max(lines[0] // 15, 1)):
        sessions, given = fork_all(), dict[str, list[int]]()
        starts, lost = [len(session.tokens) for session in sessions], 0
        try:
            with interrupted_at(place, everywhere=False):
                run(sessions, given)
        except KeyboardInterrupt:
            pass
        assert is_free(memory)
        for session, start in zip(sessions, starts, strict=True):
            tokens, expected, new = given.get(session.name, []), whole[session.name], list(session.tokens[start:])
            assert context_of(session).cache.is_whole, place
            assert context_of(session).notify == memory._notify, place
            if new and new[-len(tokens) :] != tokens:  # struck on the way from the session to the caller
                lost += 1
                tokens = expected[: len(tokens) + 1]
            assert new[len(new) - len(tokens) :] == tokens == expected[: len(tokens)], place
            rest = [token for piece in session.generate(40 - len(tokens)) for token in piece.token_ids]
            assert [*tokens, *rest][: len(expected)] == expected, place
        assert lost <= 1
