"""Segments that are refined: better slots from the originals, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import some_tokens
from inside import cache_of, context_of, originals_of, pending_of, records_of, state_of
from policies import tight_policy
from random_operations import differences

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.cli.saved import segments_table
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CorruptSession, InvalidPolicy, UnsupportedOperation
from am_memory.events import CompactionProgress, Event, OriginalsLost, SegmentRefined, ignore
from am_memory.recall.originals import Loss
from am_memory.session import refining
from am_memory.session.rebuild import rebuild
from am_memory.session.saving import snapshot
from am_memory.storage.store import Store

POLICY = tight_policy(originals="host", recall_tokens=0, self_study_tokens=4)
NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path) -> NewMemory:
    def make(on_event: Callable[[Event], None] = ignore, engine: Any = engine, **changes: object) -> Memory:
        policy = POLICY.with_changes(**changes)
        return Memory(engine, policy, sampling=Sampling(temperature=0), store=tmp_path / "store", on_event=on_event)

    return make


def told_session(memory: Memory, num_tokens: int = 140, name: str = "alice") -> Session:
    session = memory.session(name)
    session.append(some_tokens(num_tokens))
    assert len(session.segments) > 1
    return session


def branch_of(session: Session) -> Any:
    return context_of(session).fork("before")


def assert_equals_its_rebuild(session: Session) -> None:
    rebuilt = branch_of(session)
    rebuild(rebuilt, len(rebuilt.tokens), "a test")
    assert differences(context_of(session), rebuilt) == []


# What a refinement is


def test_refined_segments_have_as_many_slots_and_a_smaller_error(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(on_event=events.append))
    before, slots = session.segments, state_of(session)
    refined = session.refine()
    assert refined == [event for event in events if isinstance(event, SegmentRefined)]
    assert {(one.start, one.end) for one in refined} == {(segment.start, segment.end) for segment in before}
    assert all(one.error_after < one.error_before for one in refined)
    assert session.segments == before
    assert session.stats.num_refined == len(before)
    for layer, old in zip(state_of(session).layers, slots.layers, strict=True):
        for segment in before:
            new = layer.slots.within(segment.start, segment.end)
            assert sorted(new.ranks.tolist()) != []
            assert int(new.ranks.max()) < segment.num_slots
        assert not torch.equal(layer.slots.bias[:4], old.slots.bias[:4]) or layer.slots.cu_slots != old.slots.cu_slots
        assert torch.equal(layer.buffer.key, old.buffer.key)
    counts = [sum(layer.slots.num_slots for layer in state.layers) for state in (state_of(session), slots)]
    assert counts[0] == counts[1]


def test_a_segment_is_refined_once(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    assert session.refine()
    assert session.refine() == []


def test_a_segment_that_has_had_these_queries_is_refined_after_it_has_shrunk(new_memory: NewMemory) -> None:
    session = new_memory(refine_queries=("repeat",)).session()
    session.append(some_tokens(80))
    session.compact(0.5)
    assert session.refine() == []
    (first,) = session.segments
    session.append(some_tokens(160, seed=1))
    assert session.segments[0].num_slots < refining.LITTLE_CUT * first.num_slots
    assert (first.start, first.end) in {(one.start, one.end) for one in session.refine()}


def test_live_queries_are_those_that_the_compaction_had_seen(new_memory: NewMemory) -> None:
    """They are read again; what came after the compaction, and may be forgotten, is not among them."""
    session = told_session(new_memory(refine_queries=("live",)))
    made = records_of(session)[0]
    planned = refining.plan_refinement(context_of(session), session.segments[0])
    assert planned.later_tokens == list(session.tokens[made.plan.newest.end : made.at_tokens])
    assert len(session.refine()) == len(session.segments)


def test_without_any_query_a_segment_is_not_refined(new_memory: NewMemory) -> None:
    session = new_memory(refine_queries=("live",)).session()
    session.append(some_tokens(80))
    session.compact(1.0)
    assert session.refine() == []


def test_summaries_and_slots_of_everything_stay_as_they_were_made(new_memory: NewMemory) -> None:
    """Their originals are those of the text, which these slots do not stand for alone."""
    for experiments in (Experiments(summary_tokens=6), Experiments(recompaction="refit")):
        session = new_memory(experiments=experiments).session()
        session.append(some_tokens(140))
        assert session.segments
        assert session.refine() == []


def test_without_pinned_tokens_nothing_stands_before_the_first_segment(new_memory: NewMemory) -> None:
    session = told_session(new_memory(pinned=0))
    assert session.segments[0].start == 0
    assert len(session.refine()) == len(session.segments)


def test_fewest_slots_for_its_tokens_first(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    left = {(segment.start, segment.end): segment.num_tokens / segment.num_slots for segment in session.segments}
    refined = [left[one.start, one.end] for one in session.refine()]
    assert refined == sorted(refined, reverse=True)


@pytest.mark.parametrize("index", [0, 1])
def test_it_sees_what_stood_before_the_end_of_the_segment_and_nothing_else(new_memory: NewMemory, index: int) -> None:
    """Its exact entries are those that were read; what is behind it may be anything."""
    session = told_session(new_memory(chunk_tokens=1))
    other = session.fork("other")
    other.append(some_tokens(8, seed=7))
    segment = session.segments[index]
    planned = [refining.plan_refinement(context_of(each), segment) for each in (session, other)]
    cache, longer = (one._cache_before() for one in planned)
    assert cache.num_tokens == longer.num_tokens == segment.end
    assert cache.segments == session.segments[:index]
    whole = new_memory(chunk_tokens=1, trigger_tokens=2000, keep_ratio=0.5).session("whole")
    whole.append(session.tokens[: segment.end + 1])
    for mine, theirs, exact in zip(cache.compactable, longer.compactable, cache_of(whole).compactable, strict=True):
        assert torch.equal(mine.tail[0], theirs.tail[0])
        if index == 0:
            assert torch.equal(mine.tail[0], exact.exact_entries(segment.start, segment.end)[0][None])
            assert torch.equal(mine.slots.key, exact.exact_entries(0, 3)[0].flatten(0, 1))


def test_beyond_the_window_a_segment_is_refined_where_it_stands(engine: TransformersEngine) -> None:
    """Its originals are as they were written: its keys, and those before it, are turned back, and then to their place."""
    near = copy.copy(engine)
    near.info = replace(engine.info, window_tokens=120)
    memory = Memory(near, POLICY.with_changes(chunk_tokens=1), sampling=Sampling(temperature=0))
    session = memory.session()
    session.append(some_tokens(200))
    moved = [segment for segment in session.segments if segment.shift]
    assert moved
    (first, *_) = moved
    planned = refining.plan_refinement(context_of(session), first)
    cache = planned._cache_before()
    whole = Memory(engine, POLICY.with_changes(trigger_tokens=2000)).session()
    whole.append(session.tokens[: first.end + 1])
    for mine, exact in zip(cache.compactable, cache_of(whole).compactable, strict=True):
        torch.testing.assert_close(mine.slots.key, exact.exact_entries(0, 3)[0].flatten(0, 1), rtol=0, atol=1e-4)
    session.refine()
    assert session.stats.num_refined == len(session.segments)
    assert_equals_its_rebuild(session)


# Tokens and records give it again


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"segment_dtype": "int8", "originals": "disk"},
        {"reference_queries": ("live",), "tool_result_weight": 0.5},
        {"ahead_tokens": 12},
        {"max_error": 0.05, "refine_queries": ("repeat", "live")},
    ],
    ids=["plain", "int8 on disk", "live alone", "ahead", "gate"],
)
def test_a_rebuild_repeats_it(new_memory: NewMemory, changes: dict[str, object]) -> None:
    session = told_session(new_memory(chunk_tokens=1, **changes))
    assert session.refine()
    assert_equals_its_rebuild(session)
    session.append(some_tokens(50, seed=1))
    assert_equals_its_rebuild(session)


def test_a_branch_under_another_policy_repeats_it_under_the_old_one(new_memory: NewMemory) -> None:
    session = told_session(new_memory(chunk_tokens=1, head_budget="uniform"))
    session.refine()
    branch = session.fork("branch", policy=POLICY.with_changes(chunk_tokens=1, refine_queries=("repeat",)))
    branch.append(some_tokens(20, seed=1))
    assert_equals_its_rebuild(branch)


def test_going_back_keeps_what_is_refined(new_memory: NewMemory) -> None:
    """It has seen nothing of what is forgotten, if its segment stays."""
    session = told_session(new_memory(chunk_tokens=1))
    num_tokens = len(session.tokens)
    session.append(some_tokens(4, seed=1))
    session.refine()
    assert session.can_rewind(num_tokens)
    session.rewind(num_tokens)
    assert session.stats.num_refined == len(session.segments)
    assert [one.at_tokens for one in records_of(session)[-1].refinements] == [num_tokens - 1] * len(session.segments)
    session.append(some_tokens(4, seed=2))
    assert_equals_its_rebuild(session)


def test_going_back_behind_a_compaction_takes_it_back(new_memory: NewMemory) -> None:
    session = told_session(new_memory(chunk_tokens=1))
    session.refine()
    session.rewind(records_of(session)[-1].at_tokens - 5)
    assert session.stats.num_refined == 0
    assert_equals_its_rebuild(session)


def test_a_branch_has_slots_of_its_own(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    before, branch = branch_of(session), session.fork("branch")
    branch.refine()
    assert differences(context_of(session), before) == []
    assert session.stats.num_refined == 0


def test_a_saved_session_goes_on_as_if_it_had_not_been_away(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    session.refine()
    session.save()
    resumed = new_memory().session("alice")
    held_as = [*segments_table(snapshot(session)).columns[1].cells]
    assert sum(str(how).endswith("slots per head, refined") for how in held_as) == len(session.segments)
    assert records_of(resumed) == records_of(session)
    assert resumed.stats.num_refined == session.stats.num_refined
    assert resumed.refine() == []
    texts = ["".join(piece.text for piece in one.generate(8)) for one in (session, resumed)]
    assert texts[0] == texts[1]
    assert differences(context_of(session), context_of(resumed)) == []


@pytest.mark.parametrize("changes", [{"start": 4}, {"conversations": ((9999,),)}])
def test_a_forged_record_is_refused(new_memory: NewMemory, tmp_path: Path, changes: dict[str, object]) -> None:
    session = told_session(new_memory())
    session.refine()
    *before, last = records_of(session)
    forged = replace(last, refinements=(replace(last.refinements[0], **changes),))
    context_of(session).records = [*before, forged]
    session.save()
    assert Store(str(tmp_path / "store")).load("alice").records[-1] == forged
    with pytest.raises(CorruptSession):
        new_memory().session("alice")


# All or nothing


@pytest.mark.parametrize("stage", ["read", "self_study", "repeat", "score", "fit"])
def test_giving_up_at_any_stage_leaves_the_session_as_it_was(new_memory: NewMemory, stage: str) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, CompactionProgress) and event.stage == stage:
            raise KeyboardInterrupt

    memory = new_memory(ahead_tokens=12)
    session = told_session(memory)
    before = branch_of(session)
    with memory.listening(interrupt), pytest.raises(KeyboardInterrupt):
        session.refine()
    assert differences(context_of(session), before) == []
    assert session.refine()


def test_without_originals_nothing_is_refined(new_memory: NewMemory) -> None:
    session = told_session(new_memory(originals="drop"))
    before = branch_of(session)
    assert session.refine() == []
    assert differences(context_of(session), before) == []


def test_a_segment_whose_originals_turn_out_to_be_lost_stays_as_it_is(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(on_event=events.append, originals="disk"))
    (original, *_) = originals_of(session)
    part = original._held.part  # type: ignore[union-attr]
    part.read = lambda: b"damaged"
    refined = session.refine()
    assert original.lost
    assert sum(isinstance(event, OriginalsLost) for event in events) == 1
    assert {one.start for one in refined} == {segment.start for segment in session.segments} - {original.start}


def test_originals_that_were_dropped_are_skipped(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    originals_of(session)[-1].replace(Loss("no room", is_dropped=True))
    assert len(session.refine()) == len(session.segments) - 1


def test_a_compaction_in_the_background_is_swapped_in_first(new_memory: NewMemory) -> None:
    session = new_memory(ahead_tokens=12).session()
    session.append(some_tokens(89))
    assert pending_of(session) is not None
    assert not session.segments
    assert len(session.refine()) == 1
    assert pending_of(session) is None
    assert session.stats.num_refined == len(session.segments) == 1


# Beside recalled pages


def test_recalled_pages_stay_exact_and_get_the_new_slots_later(new_memory: NewMemory) -> None:
    """As if they had been put away before, and brought back after."""
    memory = new_memory(recall_tokens=40, chunk_tokens=1)
    session = told_session(memory)
    plain = session.fork("plain")
    (first, second, *_) = session.segments
    session.recall((first.start + 2, first.start + 12))
    session.recall((second.start, second.start + 9))
    exact = session.recalled
    session.refine()
    plain.refine()
    assert session.recalled == exact
    assert session.stats.kv_tokens <= session.trigger_tokens
    session.append(some_tokens(4, seed=1))
    assert_equals_its_rebuild(session)
    resting = context_of(session).fork_at_rest().state()
    for mine, theirs in zip(resting.layers, state_of(plain).layers, strict=True):
        assert torch.equal(mine.slots.key, theirs.slots.key)
        assert torch.equal(mine.slots.bias, theirs.slots.bias)


# Who can


def test_refining_with_sliding_windows_or_shared_cells_is_refused(
    new_sliding_model: Any, byte_tokenizer: Any, shared_llama: LlamaCppEngine
) -> None:
    """It returned an empty list, as if nothing could be gained."""
    policy = MemoryPolicy(trigger_tokens=96, keep_ratio=0.3, keep_recent=8, pinned=4)
    for engine in (TransformersEngine(new_sliding_model(), byte_tokenizer), shared_llama):
        session = Memory(engine, policy).session()
        session.append(some_tokens(110))
        assert session.segments
        with pytest.raises(UnsupportedOperation, match="sliding windows, recurrent states"):
            session.refine()
        with pytest.raises(InvalidPolicy, match="leave it at 'off'"):
            Memory(engine, policy.with_changes(refine="idle"))


@pytest.mark.parametrize(
    "changes", [{"originals": "drop"}, {"originals": "host", "experiments": Experiments(recompaction="refit")}]
)
def test_a_policy_under_which_nothing_could_be_refined_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidPolicy, match="refine"):
        MemoryPolicy(refine="idle", **changes)
