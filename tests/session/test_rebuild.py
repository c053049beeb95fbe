"""Tokens are the truth: what is made again of tokens and records is what was there, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from driven import some_tokens
from inside import cache_of, context_of, records_of
from random_operations import KINDS, POLICIES, POLICY, Driver, differences

from am_memory import Memory, MemoryPolicy, Session
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import Event, SessionRebuilt
from am_memory.session.appending import add, encode, read
from am_memory.session.rebuild import rebuild
from am_memory.solver import Block, HighestAttention

TRIGGER = POLICY.trigger_tokens
SEVERAL = ("plain", "ahead with originals", "much recall", "int8 with originals on disk", "ahead, live, int8")


@pytest.fixture
def memory(engine: TransformersEngine, events: list[Event], tmp_path: Path) -> Memory:
    return Memory(engine, POLICY, on_event=events.append, store=tmp_path / "store")


def assert_equals_its_rebuild(session: Session) -> None:
    rebuilt = context_of(session).fork("rebuilt")
    rebuild(rebuilt, len(rebuilt.tokens), "a test")
    assert differences(context_of(session), rebuilt) == []


def num_rebuilt(events: list[Event]) -> int:
    return sum(isinstance(event, SessionRebuilt) for event in events)


@pytest.mark.parametrize("name", SEVERAL)
def test_random_operations_leave_what_their_record_gives(engine: TransformersEngine, tmp_path: Path, name: str) -> None:
    """3 of 105 sessions were not what their rebuild was. `python tests/random_operations.py 3000` does many more."""
    policy = POLICY.with_changes(**POLICIES[name])
    driver = Driver(engine, policy, f"{name} 1", str(tmp_path), kinds=tuple(KINDS))
    num_compactions = len(records_of(driver.session))
    for _ in range(3):
        for _ in range(4):
            driver.step()
        num_compactions += len(records_of(driver.session))
        assert driver.differences() == [], driver.done
    assert num_compactions


def test_random_operations_on_sliding_windows(
    new_sliding_model: object, byte_tokenizer: object, tmp_path: Path
) -> None:
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer)  # type: ignore[operator, arg-type]
    driver = Driver(engine, POLICY.with_changes(ahead_tokens=15), "windows", str(tmp_path), kinds=tuple(KINDS))
    for _ in range(3):
        for _ in range(4):
            driver.step()
        assert driver.differences() == [], driver.done


# Going back behind a compaction


def test_a_compaction_that_saw_what_is_forgotten_is_taken_back(memory: Memory, events: list[Event]) -> None:
    """Its queries had been asked from behind the forgotten tokens; a rebuild, which never saw them, kept other keys."""
    session, other = memory.session("one"), memory.session("other")
    tokens = some_tokens(TRIGGER + 10)
    session.append(tokens)
    other.append(tokens[:120])
    (made,) = records_of(session)
    assert made.plan.newest.end < 120 < made.at_tokens
    assert not session.can_rewind(120)
    session.rewind(120)
    assert num_rebuilt(events) == 1
    assert session.segments == ()
    assert differences(context_of(session), context_of(other)) == []
    assert_equals_its_rebuild(session)


def test_an_answer_that_no_compaction_saw_is_dropped_and_nothing_is_read_again(
    memory: Memory, events: list[Event]
) -> None:
    session = memory.session("one")
    session.append(some_tokens(TRIGGER + 10))
    before = session.fork()
    assert len(session.segments) == 1
    for _ in range(3):
        list(session.generate(20))
        assert session.can_rewind(len(before.tokens))
        session.rewind(len(before.tokens))
    assert num_rebuilt(events) == 0
    assert differences(context_of(session), context_of(before)) == []
    assert_equals_its_rebuild(session)


def test_a_compaction_begun_before_what_is_forgotten_stays(memory: Memory, events: list[Event]) -> None:
    """It saw none of it: only that it was swapped in later, and is now swapped in earlier."""
    session = memory.session("one", policy=POLICY.with_changes(ahead_tokens=15))
    session.append(some_tokens(TRIGGER + 10))
    (made,) = records_of(session)
    num_tokens = made.at_tokens + 5
    assert not session.can_rewind(num_tokens)
    session.rewind(num_tokens)
    assert num_rebuilt(events) == 0
    assert [(made.at_tokens, made.swapped_at) for made in records_of(session)] == [(made.at_tokens, num_tokens - 1)]
    session.append(some_tokens(20, seed=1))
    assert_equals_its_rebuild(session)


def test_going_back_reads_no_more_than_was_read(memory: Memory) -> None:
    """What was told and not read yet was read by a rebuild, although nobody had asked."""
    session = memory.session("one")
    session.append(some_tokens(TRIGGER + 10))
    add(session, encode(session, some_tokens(300, seed=1)))
    session.rewind(TRIGGER - 20)
    assert read(session, 0) == 0
    session.append(some_tokens(TRIGGER + 10, seed=1))
    num_read = cache_of(session).num_tokens
    add(session, encode(session, some_tokens(300, seed=2)))
    session.rewind(len(session.tokens) - 10)
    assert cache_of(session).num_tokens == num_read
    assert_equals_its_rebuild(session)


def test_llama_cpp_takes_it_back_as_well(llama: LlamaCppEngine) -> None:
    session = Memory(llama, MemoryPolicy(trigger_tokens=96, keep_ratio=0.3, keep_recent=8, pinned=4)).session()
    session.append(some_tokens(110))
    (made,) = records_of(session)
    assert made.plan.newest.end < 90 < made.at_tokens
    session.rewind(90)
    assert session.segments == ()


# What it depended on


def test_what_was_read_while_a_segment_was_recalled_is_read_so_again(memory: Memory) -> None:
    session = memory.session("one", policy=POLICY.with_changes(originals="host"))
    session.append(some_tokens(TRIGGER + 10))
    session.recall(session.segments[0])
    session.append(some_tokens(8, seed=1))
    assert session.recalled
    assert_equals_its_rebuild(session)
    num_tokens = len(session.tokens)
    session.append(some_tokens(TRIGGER, seed=2))
    assert session.recalled == ()
    assert_equals_its_rebuild(session)
    session.rewind(num_tokens)
    assert session.recalled


def test_a_recall_is_in_the_record_of_who_keeps_no_originals_any_more(memory: Memory, tmp_path: Path) -> None:
    session = memory.session("one", policy=POLICY.with_changes(originals="disk"))
    session.append(some_tokens(TRIGGER + 10))
    session.recall(session.segments[0])
    session.append(some_tokens(8, seed=1))
    session.save()
    resumed = Memory(memory.engine, POLICY, store=tmp_path / "store").session("one", policy=POLICY)
    assert resumed.recalled == ()
    resumed.append(some_tokens(8, seed=2))
    assert_equals_its_rebuild(resumed)


@pytest.mark.parametrize("is_saved", [False, True], ids=["at once", "saved"])
def test_compactions_are_made_again_under_the_policy_that_they_were_made_under(
    memory: Memory, tmp_path: Path, is_saved: bool
) -> None:
    """A branch, or a resumed session, that went on under another policy was rebuilt under that from the beginning."""
    before = POLICY.with_changes(key_selection="omp", reference_queries=("repeat", "live"), head_budget="uniform")
    session = memory.session("one", policy=before)
    session.append(some_tokens(TRIGGER + 10))
    num_before = len(records_of(session))
    branch = session.fork("branch", policy=POLICY)
    if is_saved:
        branch.save()
        branch = Memory(memory.engine, POLICY, store=tmp_path / "store").session("branch")
    branch.append(some_tokens(TRIGGER, seed=1))
    assert len(records_of(branch)) > num_before > 0
    assert_equals_its_rebuild(branch)
    session.save()
    resumed = Memory(memory.engine, POLICY, store=tmp_path / "store").session("one", policy=POLICY)
    resumed.append(some_tokens(TRIGGER, seed=1))
    assert_equals_its_rebuild(resumed)


@dataclass(frozen=True)
class Newest:
    name: str = "newest"

    def __call__(self, block: Block, scores: torch.Tensor, num_slots: torch.Tensor) -> torch.Tensor:
        return HighestAttention()(block, torch.arange(block.seq_len).expand_as(scores).float(), num_slots)


def test_a_branch_of_a_policy_with_a_selection_of_ones_own_is_rebuilt_and_saved(memory: Memory, tmp_path: Path) -> None:
    session = memory.session("one", policy=POLICY.with_changes(key_selection=Newest()))
    session.append(some_tokens(TRIGGER + 10))
    branch = session.fork("branch", policy=POLICY)
    assert_equals_its_rebuild(branch)
    branch.save()
    resumed = Memory(memory.engine, POLICY, store=tmp_path / "store").session("branch")
    assert [made.plan for made in records_of(resumed)] == [made.plan for made in records_of(branch)]
    assert [made.policy for made in records_of(resumed)] == [None]


def test_live_queries_that_a_compaction_did_not_have_are_not_used_when_it_is_made_again(
    memory: Memory, tmp_path: Path
) -> None:
    """They are not saved: after a restart a compaction had those that passed since, and its rebuild all of them."""
    policy = POLICY.with_changes(reference_queries=("repeat", "live"))
    session = memory.session("one", policy=policy)
    session.append(some_tokens(TRIGGER - 10))
    session.save()
    resumed = Memory(memory.engine, policy, store=tmp_path / "store").session("one")
    resumed.append(some_tokens(20, seed=1))
    session.append(some_tokens(20, seed=1))
    assert [records_of(each)[0].live_start for each in (session, resumed)] == [0, TRIGGER - 11]
    for each in (session, resumed):
        assert_equals_its_rebuild(each)
