"""When to compact, what, and to how many slots: pure functions, from sizes to a plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policies import plain_policy

from am_memory import Experiments, MemoryPolicy
from am_memory.compaction.plan import (
    LONGEST_SEGMENT,
    CacheSizes,
    Plan,
    completed,
    max_compact_tokens,
    min_block_tokens,
    plan_segment,
    require_progress,
    segment_ends,
    shrink,
    trigger_in_tokens,
)
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import BudgetTooSmall, CompactionFailed, InvalidPolicy
from am_memory.kv_cache.slots import Segment, tail_start

NUM_HEADS = 6
POLICY = plain_policy(trigger_tokens=1000, keep_ratio=0.1, keep_recent=0)

quickly = settings(max_examples=300, deadline=None, derandomize=True)


def checked_trigger_tokens(policy: MemoryPolicy, window_tokens: int, num_pinned: int) -> int:
    """What a context does with its policy."""
    trigger_tokens = trigger_in_tokens(policy, window_tokens)
    require_progress(policy, trigger_tokens, num_pinned)
    return trigger_tokens


def exact_sizes(num_tokens: int, num_pinned: int = 0) -> CacheSizes:
    """Before the first compaction: the pinned tokens are in the tail."""
    return CacheSizes(num_tokens, num_pinned, (), NUM_HEADS)


def plan_compaction(
    policy: MemoryPolicy, sizes: CacheSizes, trigger_tokens: int, fraction: float | None = None
) -> Plan:
    """The plan of a whole block, as one segment."""
    return plan_segment(policy, sizes, trigger_tokens, segment_ends(policy, sizes, fraction)[-1:])


# The plan


def test_half_of_an_exact_cache_is_its_oldest_half() -> None:
    newest = plan_compaction(POLICY, exact_sizes(1000), 1000).newest
    assert (newest.start, newest.end) == (0, 500)
    assert newest.num_slots == 0.1 * 500 * NUM_HEADS


def test_pinned_tokens_are_spared() -> None:
    newest = plan_compaction(POLICY, exact_sizes(1000, num_pinned=200), 1000).newest
    assert (newest.start, newest.end) == (200, 600)


def test_recent_tokens_are_spared() -> None:
    newest = plan_compaction(MemoryPolicy(keep_recent=700, keep_ratio=0.1), exact_sizes(1000), 1000).newest
    assert (newest.start, newest.end) == (0, 300)


def test_a_fraction_by_name_does_not_spare_the_recent_tokens() -> None:
    newest = plan_compaction(MemoryPolicy(keep_recent=700), exact_sizes(1000), 1000, fraction=1.0).newest
    assert (newest.start, newest.end) == (0, 1000)


def test_compact_slots_count_as_the_oldest_part() -> None:
    segments = (Segment(4, 604, 100 * NUM_HEADS),)
    sizes = CacheSizes(1500, 4, segments, NUM_HEADS)
    newest = plan_compaction(POLICY, sizes, 1000).newest
    assert newest.start == 604
    assert newest.end - newest.start == (896 + 100) / 2 - 100


def test_older_segments_shrink_so_that_all_fit() -> None:
    segments = (Segment(0, 500, 240 * NUM_HEADS), Segment(500, 700, 10 * NUM_HEADS))
    after = plan_compaction(POLICY, CacheSizes(1450, 0, segments, NUM_HEADS), 1000).segments
    bound = max_compact_tokens(POLICY, 1000) * NUM_HEADS
    assert sum(segment.num_slots for segment in after) <= bound == 250 * NUM_HEADS
    assert after[0].num_slots < segments[0].num_slots
    assert after[1] == segments[1]


def test_a_new_segment_has_its_floor_however_long_the_conversation() -> None:
    """Equal shares of a bound fall below a slot per head in the end: a layer without any slots could not be fitted."""
    policy = MemoryPolicy(trigger_tokens=64, keep_ratio=0.25, keep_recent=0, experiments=Experiments(min_slots=2))
    older = tuple(Segment(start, start + 10, 2 * NUM_HEADS) for start in range(0, 10_000, 10))
    made = plan_compaction(policy, CacheSizes(10_048, 0, older, NUM_HEADS), 64, fraction=1.0)
    assert made.newest.num_slots == 2 * NUM_HEADS
    assert sum(segment.num_slots for segment in made.segments) <= 16 * NUM_HEADS


def test_refit_makes_one_segment_of_everything_before_it() -> None:
    policy = MemoryPolicy(trigger_tokens=1000, keep_recent=0, experiments=Experiments(recompaction="refit"))
    made = plan_compaction(policy, CacheSizes(1500, 4, (Segment(4, 604, 60 * NUM_HEADS),), NUM_HEADS), 1000)
    assert made.is_refit
    assert len(made.segments) == 1
    assert made.newest.start == 4
    assert made.newest.end == 604 + math.ceil((896 + 60) / 2 - 60)


@pytest.mark.parametrize("num_tokens", [0, 3, 4])
def test_nothing_but_pinned_tokens_cannot_be_compacted(num_tokens: int) -> None:
    with pytest.raises(CompactionFailed, match="nothing to compact: 0 exact tokens after 4 pinned ones.*read more"):
        plan_compaction(POLICY, exact_sizes(num_tokens, num_pinned=4), 1000)


def test_nothing_but_recent_tokens_cannot_be_compacted_by_the_trigger() -> None:
    with pytest.raises(CompactionFailed, match=r"64 of them recent.*read more first, or raise the fraction"):
        plan_compaction(MemoryPolicy(keep_recent=64), exact_sizes(60), 1000)


def test_a_block_too_small_for_its_slots_is_refused_with_the_way_out() -> None:
    policy = MemoryPolicy(keep_ratio=0.001, experiments=Experiments(min_slots=4))
    with pytest.raises(
        BudgetTooSmall,
        match=r"keep_ratio 0.001 of 512 tokens leaves 0.5 slots .* at least 4 .* raise keep_ratio to 0.008",
    ):
        plan_compaction(policy, exact_sizes(512), 8192, fraction=1.0)


# Segments of a block


def test_a_long_block_becomes_segments_of_like_length_that_end_at_boundaries() -> None:
    def boundary(earliest: int, latest: int) -> int:
        return latest // 100 * 100 if latest // 100 * 100 >= earliest else latest

    ends = segment_ends(POLICY, exact_sizes(4000, num_pinned=30), 1.0, boundary)
    assert ends[-1] == 4000, "a fraction by name is kept to the token"
    assert all(end % 100 == 0 for end in ends)
    lengths = [end - start for start, end in itertools.pairwise([30, *ends])]
    assert len(lengths) == math.ceil(3970 / LONGEST_SEGMENT)
    assert max(lengths) <= 1.25 * LONGEST_SEGMENT
    assert min(lengths) >= 0.5 * LONGEST_SEGMENT


def test_a_short_block_is_one_segment() -> None:
    assert segment_ends(POLICY, exact_sizes(LONGEST_SEGMENT), 1.0) == [LONGEST_SEGMENT]


def test_each_segment_of_a_long_block_has_room_for_its_floor() -> None:
    policy = MemoryPolicy(keep_ratio=0.002, experiments=Experiments(min_slots=2))
    assert segment_ends(policy, exact_sizes(1500), 1.0) == [1500]


@pytest.mark.parametrize(
    "policy",
    [
        MemoryPolicy(reference_queries=("self_study",)),
        MemoryPolicy(experiments=Experiments(summary_tokens=100)),
        MemoryPolicy(experiments=Experiments(recompaction="refit")),
        MemoryPolicy(max_error=0.1),
        MemoryPolicy(tool_result_weight=0.5),
    ],
    ids=["self_study", "summary", "refit", "gate", "weights"],
)
def test_a_block_that_must_be_fitted_as_a_whole_is_one_segment(policy: MemoryPolicy) -> None:
    assert segment_ends(policy, exact_sizes(4000), 1.0) == [4000]


sizes_of_some_cache = st.builds(
    lambda spans, tail, pinned: CacheSizes(
        num_tokens=pinned + sum(span for span, _ in spans) + tail,
        num_pinned=pinned,
        segments=tuple(
            Segment(pinned + start, pinned + start + span, int(span * NUM_HEADS * kept))
            for start, (span, kept) in zip(
                itertools.accumulate((span for span, _ in spans), initial=0), spans, strict=False
            )
        ),
        num_heads=NUM_HEADS,
    ),
    st.lists(st.tuples(st.integers(1, 400), st.floats(0, 1)), max_size=6),
    st.integers(0, 1500),
    st.integers(0, 50),
)


@quickly
@given(
    sizes=sizes_of_some_cache,
    fraction=st.none() | st.floats(0.01, 1),
    keep_ratio=st.floats(0.01, 1),
    keep_recent=st.integers(0, 100),
)
def test_a_plan_covers_exact_tokens_that_may_go_and_fits_its_bound(
    sizes: CacheSizes, fraction: float | None, keep_ratio: float, keep_recent: int
) -> None:
    policy = MemoryPolicy(keep_ratio=keep_ratio, keep_recent=keep_recent)
    try:
        made = plan_compaction(policy, sizes, 1000, fraction)
    except (CompactionFailed, BudgetTooSmall):
        assume(False)
    newest = made.newest
    assert newest.start == sizes.exact_start
    assert newest.start < newest.end <= sizes.num_tokens - (keep_recent if fraction is None else 0)
    assert [(each.start, each.end) for each in made.segments[:-1]] == [
        (each.start, each.end) for each in sizes.segments
    ]
    assert all(new.num_slots <= old.num_slots for new, old in zip(made.segments, sizes.segments, strict=False))
    assert sum(each.num_slots for each in made.segments) <= max_compact_tokens(policy, 1000) * NUM_HEADS


@quickly
@given(
    trigger=st.integers(2, 400),
    num_pinned=st.integers(0, 60),
    keep_recent=st.integers(0, 60),
    compact_fraction=st.floats(0.05, 1),
    keep_ratio=st.floats(0.02, 1),
    bound=st.none() | st.integers(1, 200),
)
def test_a_policy_that_is_taken_never_gets_stuck(
    trigger: int, num_pinned: int, keep_recent: int, compact_fraction: float, keep_ratio: float, bound: int | None
) -> None:
    """Some policies passed that could not go on: the cache is up to a token below the trigger when it fires, as slots
    are counted in the mean over heads, and then half of it, rounded, was not more than what was compact."""
    policy = MemoryPolicy(
        trigger_tokens=trigger,
        compact_fraction=compact_fraction,
        keep_ratio=keep_ratio,
        keep_recent=keep_recent,
        max_compact_tokens=bound,
    )
    try:
        checked_trigger_tokens(policy, 4096, num_pinned)
    except InvalidPolicy:
        assume(False)
    sizes = exact_sizes(0, num_pinned)

    def kv_tokens() -> float:
        return (
            sizes.num_tokens - tail_start(sizes.segments) + (num_pinned if sizes.segments else 0) + sizes.compact_slots
        )

    for _ in range(12):
        room = int(trigger - kv_tokens())
        sizes = replace(sizes, num_tokens=sizes.num_tokens + room)
        while kv_tokens() + 1 > trigger:
            before = kv_tokens()
            sizes = replace(sizes, segments=plan_compaction(policy, sizes, trigger).segments)
            assert kv_tokens() < before


# Shrinking


def test_segments_that_fit_are_left_alone() -> None:
    segments = [Segment(0, 10, 5), Segment(10, 20, 3)]
    assert shrink(segments, 8) == segments


def test_segments_are_cut_to_equal_shares_for_each_token() -> None:
    segments = [Segment(0, 100, 90), Segment(100, 400, 270), Segment(400, 500, 100)]
    assert [segment.num_slots for segment in shrink(segments, 100)] == [20, 60, 20]


def test_a_segment_poorer_than_its_share_gives_nothing() -> None:
    segments = [Segment(0, 100, 5), Segment(100, 200, 100), Segment(200, 300, 60)]
    assert [segment.num_slots for segment in shrink(segments, 105)] == [5, 50, 50]


many_segments = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=8).map(
    lambda pairs: [
        Segment(start, start + size, slots)
        for start, (size, slots) in zip(
            itertools.accumulate((size for size, _ in pairs), initial=0), pairs, strict=False
        )
    ]
)


@quickly
@given(segments=many_segments, max_slots=st.integers(0, 600))
def test_shrinking_fits_fills_and_never_grows(segments: list[Segment], max_slots: int) -> None:
    after = shrink(segments, max_slots)
    total = sum(segment.num_slots for segment in after)
    assert total <= max_slots or after == segments
    assert total >= min(max_slots, sum(segment.num_slots for segment in segments)) - len(segments)
    assert all(new.num_slots <= old.num_slots for new, old in zip(after, segments, strict=True))
    cut = [new for new, old in zip(after, segments, strict=True) if new != old]
    levels = [(segment.num_slots + 1) / segment.num_tokens for segment in cut]
    whole = [new for new, old in zip(after, segments, strict=True) if new == old]
    assert all(segment.num_slots / segment.num_tokens <= min(levels) for segment in whole if levels)


@quickly
@given(segments=many_segments, bounds=st.lists(st.integers(0, 600), min_size=1, max_size=4))
def test_shrinking_in_steps_is_shrinking_at_once_up_to_rounding(segments: list[Segment], bounds: list[int]) -> None:
    in_steps = segments
    for bound in sorted(bounds, reverse=True):
        in_steps = shrink(in_steps, bound)
    at_once = shrink(segments, min(bounds))
    for one, other in zip(in_steps, at_once, strict=True):
        assert abs(one.num_slots - other.num_slots) <= len(bounds) * len(segments)


# The trigger


def test_a_trigger_is_tokens_or_a_fraction_of_the_window() -> None:
    assert checked_trigger_tokens(MemoryPolicy(trigger_tokens=512), 4096, 4) == 512
    assert checked_trigger_tokens(MemoryPolicy(trigger_tokens=0.25), 4096, 4) == 1024
    assert checked_trigger_tokens(MemoryPolicy(trigger_tokens=1.0), 4096, 4) == 4096
    assert isinstance(MemoryPolicy(trigger_tokens=1.0).trigger_tokens, float)


def test_compact_tokens_are_bounded_by_half_of_what_a_compaction_covers() -> None:
    assert max_compact_tokens(MemoryPolicy(compact_fraction=0.5), 1000) == 250
    assert max_compact_tokens(MemoryPolicy(max_compact_tokens=77), 1000) == 77


def test_the_smallest_block_is_the_one_at_the_bound() -> None:
    assert min_block_tokens(POLICY, 1000, 0) == 250
    assert min_block_tokens(MemoryPolicy(keep_recent=700), 1000, 0) == 50


# Policies that cannot work with a model


@pytest.mark.parametrize(
    ("values", "window", "pinned", "words"),
    [
        ({"trigger_tokens": 9000}, 8192, 4, ["trigger_tokens 9000", "window of 8192", "set it to 8192 or less"]),
        ({"trigger_tokens": 100, "keep_recent": 90}, 8192, 4, ["trigger_tokens 100", "90", "raise trigger_tokens"]),
        ({"trigger_tokens": 100}, 8192, 90, ["trigger_tokens 100", "90 tokens are pinned", "or lower keep_recent, pinned"]),
        ({"trigger_tokens": 200, "max_compact_tokens": 100}, 8192, 4, ["trigger_tokens 200", "up to 100", "lower"]),
        ({"trigger_tokens": 1e-3}, 100, 0, ["trigger_tokens 0", "raise trigger_tokens"]),
    ],
    ids=["above the window", "recent", "pinned", "compact", "none at all"],
)  # fmt: skip
def test_a_trigger_that_cannot_work_says_why_and_what_to_do(
    values: dict[str, object], window: int, pinned: int, words: list[str]
) -> None:
    with pytest.raises(InvalidPolicy) as raised:
        checked_trigger_tokens(MemoryPolicy(**values), window, pinned)
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_ratio_that_leaves_too_few_slots_says_which_would_do() -> None:
    policy = MemoryPolicy(trigger_tokens=256, keep_ratio=0.01, experiments=Experiments(min_slots=4))
    with pytest.raises(
        BudgetTooSmall, match=r"keep_ratio 0.01 of \d+ tokens .*at least 4 .*raise keep_ratio to 0\.0\d+"
    ):
        checked_trigger_tokens(policy, 4096, 4)


def test_the_ratio_that_the_message_names_does_work() -> None:
    experiments = Experiments(min_slots=4)
    policy = MemoryPolicy(trigger_tokens=256, keep_ratio=0.01, experiments=experiments)
    with pytest.raises(BudgetTooSmall) as raised:
        checked_trigger_tokens(policy, 4096, 4)
    named = float(str(raised.value).split("raise keep_ratio to ")[1].split(",")[0])
    policy = MemoryPolicy(trigger_tokens=256, keep_ratio=named, experiments=experiments)
    assert checked_trigger_tokens(policy, 4096, 4) == 256


def test_a_bound_below_the_floor_of_a_head_is_refused() -> None:
    """The floor was compared with the new segment before it was cut to the bound."""
    policy = MemoryPolicy(trigger_tokens=256, max_compact_tokens=2, experiments=Experiments(min_slots=4))
    with pytest.raises(BudgetTooSmall, match=r"max_compact_tokens 2 .* at least 4 .*: raise max_compact_tokens to 4"):
        checked_trigger_tokens(policy, 4096, 4)


@pytest.mark.parametrize(
    ("changes", "ridge"),
    [
        ({}, 0.5),
        ({"recall_tokens": 0}, None),
        ({"originals": "drop"}, None),
        ({"trigger_tokens": 128}, None),
        ({"trigger_tokens": 128, "recall_tokens": 16}, 0.5),
        ({"trigger_tokens": 128, "ridge": 0.1}, 0.1),
        ({"trigger_tokens": 100_000}, 0.5),
    ],
    ids=["room", "none asked for", "no originals", "too small for room", "a little room", "given", "above the window"],
)
def test_values_stay_near_the_originals_where_there_is_room_for_pages(
    engine: TransformersEngine, changes: dict[str, Any], ridge: float | None
) -> None:
    """Whatever a policy asks for, without room no page answers a question, and the slots alone do."""
    policy = MemoryPolicy(**{"trigger_tokens": 1024, **changes})
    assert completed(policy, engine).ridge == ridge
    recalls = ridge == 0.5
    assert completed(policy, engine).reference_queries == (("predicted",) if recalls else ("repeat",))
    assert completed(policy.with_changes(reference_queries=("live",)), engine).reference_queries == ("live",)
