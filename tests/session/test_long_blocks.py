"""A long block becomes several segments in one compaction, which succeeds as a whole or changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from driven import some_tokens
from inside import context_of, records_of
from policies import tight_policy
from random_operations import differences

from am_memory import Memory, Sampling, Session
from am_memory.compaction.job import CompactionJob
from am_memory.compaction.record import by_compaction
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed
from am_memory.events import CompactionFinished, CompactionProgress, CompactionStarted, Event, ignore
from am_memory.session.rebuild import rebuild

LONGEST = 16
POLICY = tight_policy()
NewMemory = Callable[..., Memory]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("am_memory.compaction.plan.LONGEST_SEGMENT", LONGEST)


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path) -> NewMemory:
    def make(on_event: Callable[[Event], None] = ignore, **changes: object) -> Memory:
        policy = POLICY.with_changes(**changes)
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=tmp_path / "store", on_event=on_event)

    return make


def told_session(memory: Memory) -> Session:
    session = memory.session("alice")
    session.append(some_tokens(80))
    assert not session.segments
    return session


def test_one_compaction_makes_several_segments_and_one_report(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(events.append))
    events.clear()
    kv_tokens = session.stats.kv_tokens
    report = session.compact(1.0)
    assert len(session.segments) == 5
    assert all(segment.num_tokens <= 1.25 * LONGEST for segment in session.segments)
    assert all(before.end == after.start for before, after in pairwise(session.segments))
    assert (report.start, report.end) == (session.segments[0].start, session.segments[-1].end) == (3, 79)
    num_heads = context_of(session).cache.num_heads
    assert report.num_slots == pytest.approx(sum(one.num_slots for one in session.segments) / num_heads)
    assert (report.kv_tokens_before, report.kv_tokens_after) == (kv_tokens, session.stats.kv_tokens)
    assert 0 < report.output_error < 1
    assert report.seconds > 0
    assert session.stats.num_compactions == 1
    first, *progress, last = events
    assert first == CompactionStarted("alice", 3, 79, kv_tokens)
    assert last == CompactionFinished("alice", report)
    assert all(isinstance(event, CompactionProgress) for event in progress)
    stages = Counter(event.stage for event in progress if isinstance(event, CompactionProgress))
    assert stages == {"repeat": 3, "score": 3, "fit": 3}


def test_a_compaction_in_the_background_covers_the_whole_block(new_memory: NewMemory) -> None:
    memory = new_memory(ahead_tokens=12)
    session = memory.session("alice")
    session.append(some_tokens(100))
    compactions = by_compaction(records_of(session))
    assert session.stats.num_compactions == len(compactions) >= 1
    for records in compactions:
        assert len(records) > 1
        assert len({(record.at_tokens, record.swapped_at) for record in records}) == 1
        assert records[0].lag_tokens == 12


@pytest.mark.parametrize("ahead_tokens", [0, 12])
@pytest.mark.parametrize("source", ["repeat", "predicted", "live"])
def test_a_rebuild_makes_the_same_segments(new_memory: NewMemory, source: str, ahead_tokens: int) -> None:
    memory = new_memory(reference_queries=(source,), ahead_tokens=ahead_tokens)
    session = memory.session("alice")
    session.append(some_tokens(260))
    assert len(session.segments) > 8
    assert session.stats.kv_tokens <= session.trigger_tokens
    rebuilt: Any = context_of(session).fork("again")
    rebuild(rebuilt, len(rebuilt.tokens), "a test")
    assert differences(context_of(session), rebuilt) == []
    session.save()
    assert new_memory().session("alice").segments == session.segments


def test_each_segment_is_fitted_in_the_slots_that_it_has_afterwards(new_memory: NewMemory) -> None:
    """At the bound, those that follow in the same compaction would else cut what was fitted a moment before."""
    session = told_session(new_memory(max_compact_tokens=8))
    report = session.compact(1.0)
    fitted = [record.plan.newest.num_slots for record in records_of(session)]
    now = [segment.num_slots for segment in session.segments]
    assert fitted == now
    assert report.num_slots == pytest.approx(sum(now) / context_of(session).cache.num_heads)
    assert report.num_slots <= 8


def test_a_failure_in_the_last_segment_leaves_the_session_as_it_was(
    new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = told_session(new_memory())
    before: Any = context_of(session).fork("before")
    run, jobs = CompactionJob.run, list[CompactionJob]()

    def fails_at_the_fourth(job: CompactionJob, progress: Any) -> Any:
        jobs.append(job)
        if len(jobs) == 4:
            raise CompactionFailed("no memory")
        return run(job, progress)

    monkeypatch.setattr(CompactionJob, "run", fails_at_the_fourth)
    with pytest.raises(CompactionFailed, match="no memory"):
        session.compact(1.0)
    assert differences(context_of(session), before) == []
    assert not session.segments
    assert not records_of(session)
    session.compact(1.0)
    assert len(session.segments) == 5
