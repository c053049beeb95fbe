"""Conversations longer than the model's window: what is old moves up, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from driven import some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import cache_of, context_of, layers_of, rebuild
from policies import tight_policy
from pydantic import TypeAdapter

from am_memory import Experiments, Memory, Sampling, Session
from am_memory.compaction.plan import CacheSizes, Plan, plan_segment, segment_ends, shift_into_window
from am_memory.compaction.record import CompactionRecord
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import Event, WindowExceeded, ignore
from am_memory.kv_cache.int8 import Quantised
from am_memory.kv_cache.slots import PINNED_RANK, Segment
from am_memory.recall.paging import Page
from am_memory.session import pages
from am_memory.session.context import Context
from am_memory.session.jobs import repeated_compaction

WINDOW = 160
POLICY = tight_policy(trigger_tokens=64)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def narrow(engine: TransformersEngine) -> TransformersEngine:
    """The tiny model, as if it had been trained on few positions."""
    twin = copy.copy(engine)
    twin.info = replace(engine.info, window_tokens=WINDOW)
    return twin


NewMemory = Callable[..., Memory]


@pytest.fixture
def new_memory(narrow: TransformersEngine, tmp_path: Path) -> NewMemory:
    def make(on_event: Callable[[Event], None] = ignore, **changes: object) -> Memory:
        policy = POLICY.model_copy(update=changes)
        return Memory(narrow, policy, sampling=GREEDY, store=tmp_path, on_event=on_event)

    return make


def read_session(memory: Memory, count: int = 400) -> Session:
    session = memory.session("alice")
    session.append(some_tokens(count))
    assert session.segments[0].shift > 0
    return session


def assert_same_cache(one: Context, other: Context, atol: float = 0) -> None:
    assert one.cache.segments == other.cache.segments
    for mine, theirs in zip(one.cache.compactable, other.cache.compactable, strict=True):
        held = (*mine.slots.tensors, mine.slots.positions, mine.slots.ranks)
        expected = (*theirs.slots.tensors, theirs.slots.positions, theirs.slots.ranks)
        torch.testing.assert_close(held, expected, rtol=0, atol=atol)


# Where segments stand


def test_nothing_moves_within_the_window(new_memory: NewMemory) -> None:
    session = new_memory().session()
    session.append(some_tokens(WINDOW - 32))  # what would get too far before the next compaction moves at this one
    assert len(session.segments) > 1
    assert not any(segment.shift for segment in session.segments)


def test_no_token_is_further_away_than_the_window(new_memory: NewMemory) -> None:
    session, distances = new_memory().session(), []
    for token in some_tokens(500):
        session.append([token])
        shift = session.segments[0].shift if session.segments else 0
        distances.append(len(session.tokens) - 1 - shift)  # between the first token, which is pinned, and the last
    assert max(distances) <= WINDOW
    assert any(later < earlier for earlier, later in pairwise(distances))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 90)), min_size=1, max_size=8),
    num_pinned=st.integers(0, 40),
    num_recent=st.integers(0, 60),
    trigger=st.integers(100, 400),
    reach=st.integers(1, 2000),
)
@settings(deadline=None)
def test_segments_only_move_up_and_never_past_the_newest(
    sizes: list[tuple[int, int]], num_pinned: int, num_recent: int, trigger: int, reach: int
) -> None:
    segments, start = [], num_pinned
    for shift, (num_tokens, num_slots) in enumerate(sizes):
        is_newest = shift == len(sizes) - 1
        segments.append(Segment(start, start + num_tokens, num_slots, 0 if is_newest else min(shift, sizes[-1][0])))
        start += num_tokens
    held = CacheSizes(start + num_recent, num_pinned, tuple(segments[:-1]), num_heads=3, window_tokens=reach)
    moved = shift_into_window(segments, held, trigger)
    newest = segments[-1]
    assert moved[-1] == newest
    for before, after in zip(segments, moved, strict=True):
        assert replace(after, shift=before.shift) == before
        assert before.shift <= after.shift <= max(newest.start - before.end, before.shift)
    again = [segment.start + segment.shift for segment in shift_into_window(moved, held, trigger)]
    assert again == [segment.start + segment.shift for segment in moved]


def test_what_cannot_be_moved_stays() -> None:
    segments = (Segment(4, 1000, 60), Segment(1000, 2000, 60), Segment(2000, 4000, 60))
    sizes = CacheSizes(4100, 4, segments[:2], num_heads=2)
    assert not any(segment.shift for segment in shift_into_window(segments, sizes, 100))
    assert any(segment.shift for segment in shift_into_window(segments, replace(sizes, window_tokens=1000), 100))


def test_a_refit_has_one_segment_that_stays(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = new_memory(events.append, experiments=Experiments(recompaction="refit")).session()
    session.append(some_tokens(400))
    assert [segment.shift for segment in session.segments] == [0]
    (exceeded,) = [event for event in events if isinstance(event, WindowExceeded)]
    assert exceeded.immovable == "recompaction 'refit' has one segment for all that was said"
    assert str(exceeded).endswith("cannot be moved nearer: recompaction 'refit' has one segment for all that was said")


def test_what_is_refit_stays_where_it_was_moved_to() -> None:
    """Pinned tokens count to the first segment, whichever that is: one that began anew would turn them twice."""
    sizes = CacheSizes(400, 3, (Segment(3, 200, 30, shift=90), Segment(200, 340, 30)), num_heads=2)
    policy = POLICY.with_changes(experiments=Experiments(recompaction="refit"))
    assert [segment.shift for segment in plan_segment(policy, sizes, 64, [300]).segments] == [90]


def test_leaving_the_window_says_that_what_is_old_moves(new_memory: NewMemory) -> None:
    events: list[Event] = []
    read_session(new_memory(events.append))
    (exceeded,) = [event for event in events if isinstance(event, WindowExceeded)]
    assert exceeded.immovable is None
    assert str(exceeded).endswith(
        "past the 160 positions that the model was trained on; compacted keys are moved to nearer positions"
    )


# What moving is


def test_only_keys_turn_and_pinned_ones_go_with_the_oldest_segment(new_memory: NewMemory, monkeypatch) -> None:
    session = read_session(new_memory())
    monkeypatch.setattr("am_memory.compaction.plan.shift_into_window", lambda segments, *_: segments)
    context = context_of(session)
    still = context.fork("still")
    before, fitted = (
        still.cache.state(),
        plan_segment(POLICY, still.sizes, still.trigger_tokens, segment_ends(POLICY, still.sizes)[:1]),
    )
    far = Plan(tuple(replace(each, shift=each.shift + 50) for each in fitted.segments[:-1]) + fitted.segments[-1:])
    for each, planned in ((still, fitted), (context, far)):
        record = CompactionRecord(each.cache.num_tokens, planned)
        each.swap_in(repeated_compaction(each, each.cache, [record]).run(lambda *_: None))
    for layer, unmoved in zip(context.cache.compactable, still.cache.compactable, strict=True):
        slots, expected = layer.slots, unmoved.slots
        assert torch.equal(slots.value, expected.value)
        assert torch.equal(slots.bias, expected.bias)
        assert torch.equal(slots.positions, expected.positions)
        is_old = slots.positions < fitted.newest.start
        assert (slots.ranks[is_old] == PINNED_RANK).sum() == 3 * slots.num_heads
        turned = layer.rotation.rotated(expected.key[is_old], torch.tensor(50))
        torch.testing.assert_close(slots.key[is_old], turned)
        assert torch.equal(slots.key[~is_old], expected.key[~is_old])
    assert before.segments != context.cache.segments


def test_a_rebuild_gives_the_same_cache(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    before = context_of(session).fork("before")
    rebuild(session)
    assert_same_cache(context_of(session), before, atol=1e-5)


def test_rewinding_into_a_compacted_span_goes_back_to_where_segments_stood(new_memory: NewMemory) -> None:
    session = new_memory().session()
    session.append(some_tokens(130))
    earlier = context_of(session).fork("earlier")
    session.append(some_tokens(300, seed=1))
    assert session.segments[0].shift > 0
    session.rewind(130)
    assert_same_cache(context_of(session), earlier, atol=1e-5)


def test_a_saved_session_goes_on_as_if_it_had_not_been_saved(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    session.save()
    resumed = new_memory().session("alice")
    assert_same_cache(context_of(resumed), context_of(session))
    for each in (session, resumed):
        each.append(some_tokens(200, seed=1))
    assert_same_cache(context_of(resumed), context_of(session))


def test_segments_that_were_saved_without_a_shift_have_none() -> None:
    assert TypeAdapter(Segment).validate_python({"start": 3, "end": 9, "num_slots": 4}) == Segment(3, 9, 4, shift=0)


def test_in_int8_what_moved_is_coded_again_and_a_rebuild_gives_the_same(new_memory: NewMemory) -> None:
    plain = read_session(new_memory(max_compact_tokens=24))
    session = read_session(new_memory(max_compact_tokens=24, segment_dtype="int8"))
    assert [segment.shift for segment in session.segments] == [segment.shift for segment in plain.segments]
    slots = layers_of(session)[0].slots
    assert slots is not None
    assert isinstance(slots.key, Quantised)
    assert not slots.tensors[0].is_floating_point()
    before = copy.copy(context_of(session))
    before.cache = cache_of(session).fork()
    rebuild(session)
    assert_same_cache(before, context_of(session))


def test_a_fork_moves_its_own_segments(new_memory: NewMemory) -> None:
    session = read_session(new_memory())
    before, logits = session.segments, session.logits("owl")
    branch = session.fork()
    branch.append(some_tokens(300, seed=1))
    assert branch.segments[0].shift > before[0].shift
    assert session.segments == before
    assert torch.equal(session.logits("owl"), logits)


def test_generate_moves_what_is_old(new_memory: NewMemory, narrow: TransformersEngine) -> None:
    cache = new_memory().cache()
    prompt = torch.tensor([some_tokens(100)])
    narrow.model.generate(prompt, cache=cache, max_new_tokens=150, do_sample=False, eos_token_id=None, pad_token_id=258)
    assert cache.segments[0].shift > 0


# Entries that come back


def test_a_recalled_page_stands_where_its_slots_stood(new_memory: NewMemory) -> None:
    session = read_session(new_memory(originals="host", recall_tokens=0, trigger_tokens=128), 700)
    session.compact(0.9)
    segment = session.segments[1]
    assert segment.shift > 0
    context = context_of(session)
    before, original = context.fork("before"), next(o for o in context.originals if o.start == segment.start)
    assert session.recall(segment) == [Page(segment.start, segment.end)]
    for layer, (key, _) in zip(context.cache.compactable, original.layers(), strict=True):
        held = layer.slots.within(segment.start, segment.end).key.view(key.shape)
        torch.testing.assert_close(held, layer.rotation.rotated(key, torch.tensor(segment.shift)))
    pages.put_away(context, context.recalled[0])
    assert_same_cache(context, before)
