"""Watching a context: when it compacts, how large it gets, how it goes back, and what a failure leaves behind."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import FrameType

import pytest
import torch
from driven import read, some_tokens, write
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from inside import layers_of
from policies import plain_policy, tight_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import am_memory
from am_memory import Experiments, Memory, MemoryPolicy
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidInput, InvalidPolicy
from am_memory.events import (
    CompactionFinished,
    CompactionProgress,
    CompactionStarted,
    Event,
    ReadProgress,
    SessionRebuilt,
    WindowExceeded,
    ignore,
)
from am_memory.kv_cache.slots import PINNED_RANK
from am_memory.queries import Passage, QuerySources, ReferenceQueries, StudyConversations, logits_on_scratch
from am_memory.recall.original_store import OriginalStore
from am_memory.session.context import Context
from am_memory.session.rebuild import rewind

POLICY = tight_policy(trigger_tokens=64)
LIVE = ("live",)
BOTH = ("repeat", "live")
STUDY = {"reference_queries": ("repeat", "self_study"), "self_study_tokens": 8}
PACKAGE = str(Path(am_memory.__file__).parent)

NewContext = Callable[..., Context]


def scratch_logits(context: Context, token_ids: list[int]) -> torch.Tensor:
    """The model's predictions at each token, which does not become part of the context."""
    context.read_all()
    ids = [context.tokens[-1], *token_ids[:-1]]
    return logits_on_scratch(context.engine, context.cache, ids, context.chunk_tokens)


@pytest.fixture
def new_context(engine: TransformersEngine) -> NewContext:
    def make(policy: MemoryPolicy = POLICY, notify: Callable[[Event], None] = ignore, **changes: object) -> Context:
        policy = policy.model_copy(update=changes)
        return Context("test", engine, policy, notify, engine.new_cache(), OriginalStore(), num_pinned=policy.num_sinks)

    return make


def sampled(context: Context, conversations: StudyConversations = ()) -> list[ReferenceQueries]:
    """The queries for tokens 3 to 33."""
    sources = QuerySources(context.engine, context.policy, context.live, lambda *_: None)
    return sources.sample(Passage(context.cache, context.tokens, 3, 33, None, conversations))


def held(context: Context) -> list[Tensor]:
    """Every entry in the cache, copied."""
    entries = []
    for layer in context.cache.compactable:
        if layer.buffer is not None:
            entries += [
                layer.buffer.key[:, :, : layer.length].clone(),
                layer.buffer.value[:, :, : layer.length].clone(),
            ]
        entries += [tensor.clone() for tensor in layer.slots.fields] if layer.slots is not None else []
    return entries


def snapshot(context: Context) -> tuple[object, ...]:
    """All that a failed step must not change."""
    live = context.live and context.live._passes and {
        index: [(each.start, each.end) for each in passes] for index, passes in context.live._passes.items()
    }  # fmt: skip
    return (
        list(context.tokens),
        list(context.records),
        context.cache.state(),
        [entry.tolist() for entry in held(context)],
        (context.num_pinned, context.trigger_tokens, live),
    )


def assert_same_entries(one: Context, other: Context, atol: float = 0) -> None:
    assert one.cache.segments == other.cache.segments
    for mine, theirs in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


# The trigger


def test_nothing_is_compacted_below_the_trigger(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(65))
    assert context.cache.kv_tokens == 64
    assert context.records == []


def test_one_token_more_fires(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(66))
    assert [entry.at_tokens for entry in context.records] == [64]


def test_a_prompt_longer_than_the_trigger_is_compacted_as_it_is_read(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(400))
    assert len(context.records) > 5
    assert context.cache.num_tokens == 399
    starts, ends = zip(*[(entry.plan.newest.start, entry.plan.newest.end) for entry in context.records], strict=True)
    assert starts == (3, *ends[:-1])  # each token is compacted once


def test_the_trigger_fires_in_the_middle_of_generation(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(50))
    write(context, 40)
    assert [entry.at_tokens for entry in context.records][0] == 64
    assert len(context.tokens) == 90


def watched(context: Context, forwards: list[float]) -> Context:
    """Notes the cache's size after each forward pass that stays."""
    forward = context.forward

    def noted(*args: object, **kwargs: object) -> Tensor:
        logits = forward(*args, **kwargs)
        forwards.append(context.cache.kv_tokens)
        return logits

    context.forward = noted
    return context


steps = st.lists(st.tuples(st.booleans(), st.integers(1, 130)), min_size=1, max_size=5)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=steps,
    trigger_tokens=st.integers(40, 100),
    compact_fraction=st.sampled_from([0.4, 0.5, 0.8, 1.0]),
    keep_ratio=st.sampled_from([0.05, 0.25, 0.9, 1.0]),
    keep_recent=st.integers(0, 8),
    chunk_tokens=st.sampled_from([1, 7, 512]),
    experiments=st.sampled_from([Experiments(), Experiments(), Experiments(recompaction="refit")]),
)
def test_the_cache_never_exceeds_the_trigger_nor_the_segments_their_bound(
    new_context: NewContext, steps: list[tuple[bool, int]], **values: object
) -> None:
    try:
        context, sizes = new_context(MemoryPolicy(**values, pinned=2)), []
    except InvalidPolicy:  # one that could not go on for ever is refused beforehand
        reject()
    watched(context, sizes)
    for is_read, count in steps:
        if is_read or not context.tokens:
            read(context, some_tokens(count))
        else:
            write(context, count // 4)
        assert (
            context.cache.kv_tokens - context.cache.num_exact_tokens
            <= context.trigger_tokens * context.policy.compact_fraction / 2
        )
    assert max(sizes, default=0) <= context.trigger_tokens


def test_the_segments_keep_to_the_bound_of_the_policy(new_context: NewContext) -> None:
    context = new_context(max_compact_tokens=8)
    read(context, some_tokens(300))
    slots = [sum(segment.num_slots for segment in entry.plan.segments) for entry in context.records]
    assert max(slots) <= 8 * context.cache.num_heads
    assert len(context.cache.segments) == len(context.records)


def test_keeping_everything_changes_nothing(new_context: NewContext, stock_model: PreTrainedModel) -> None:
    context = new_context(keep_ratio=1.0, trigger_tokens=300, max_compact_tokens=140)
    tokens = some_tokens(120)
    read(context, tokens[:80])
    context.compact(1.0)
    read(context, tokens[80:])
    expected = stock_model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(context.next_logits(), expected, rtol=0, atol=1e-3)


def test_a_smaller_trigger_of_a_branch_is_met_by_several_compactions(new_context: NewContext) -> None:
    """One compaction made no room, so that tokens were read one by one, each above the trigger, each compacting."""
    context = new_context(trigger_tokens=400)
    read(context, some_tokens(390))
    branch = context.fork("branch", POLICY)
    sizes: list[float] = []
    read(watched(branch, sizes), some_tokens(30))
    assert max(sizes) <= 64


def test_pinned_tokens_stay_exact_to_the_bit(new_context: NewContext) -> None:
    context = new_context(trigger_tokens=80, pinned=10)
    read(context, some_tokens(40))
    exact = [[entry.clone() for entry in layer.exact_entries(0, 10)] for layer in context.cache.compactable]
    read(context, some_tokens(300, seed=1))
    assert len(context.records) > 3
    for layer, (key, value) in zip(context.cache.compactable, exact, strict=True):
        for head in range(layer.num_heads):
            slots = layer.slots.head(head)
            pinned = slots.where(slots.ranks == PINNED_RANK)
            assert torch.equal(pinned.key, key[head])
            assert torch.equal(pinned.value, value[head])


def test_recent_tokens_stay_exact(new_context: NewContext) -> None:
    context = new_context(compact_fraction=1.0, keep_recent=20)
    read(context, some_tokens(400))
    assert all(entry.at_tokens - entry.plan.newest.end >= 20 for entry in context.records)


# Pinning


def test_pinning_more_than_the_trigger_holds_is_refused(new_context: NewContext) -> None:
    context = new_context()
    with pytest.raises(InvalidPolicy, match="60 tokens are pinned"):
        context.pin(60)
    assert context.num_pinned == 3


def test_pinning_after_a_compaction_is_refused(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(100))
    with pytest.raises(InvalidInput, match=r"after \d compactions: pin before the first one"):
        context.pin(10)


# Scratch


def test_scratch_logits_leave_everything_as_it_was(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(100))
    before = snapshot(context)
    first = scratch_logits(context, some_tokens(70, seed=2))
    assert first.shape == (70, 260)
    assert snapshot(context) == before
    torch.testing.assert_close(scratch_logits(context, some_tokens(70, seed=2)), first, rtol=0, atol=0)


# Queries


def test_live_queries_alone_compact(new_context: NewContext) -> None:
    context = new_context(reference_queries=LIVE)
    read(context, some_tokens(150))
    write(context, 30)
    assert len(context.records) > 2


def test_live_queries_need_tokens_after_the_block(new_context: NewContext) -> None:
    context = new_context(reference_queries=LIVE)
    read(context, some_tokens(50))
    before = snapshot(context)
    with pytest.raises(CompactionFailed, match=r'no query has passed since token 49.*read more first.*add "predicted"'):
        context.compact(1.0)
    assert snapshot(context) == before


def test_the_union_has_the_queries_of_both(new_context: NewContext) -> None:
    context, alone = new_context(reference_queries=BOTH), new_context()
    for each in (context, alone):
        read(each, some_tokens(60))
    repeat = sampled(alone)
    union = sampled(context)
    groups = 2
    for both, one in zip(union, repeat, strict=True):
        assert one.query.shape[1] == groups * 30
        assert both.query.shape[1] == groups * (30 + 59 - 33)
        assert torch.equal(both.query[:, : groups * 30], one.query)


def test_self_study_adds_the_queries_of_its_conversations(new_context: NewContext) -> None:
    context, alone = new_context(**STUDY), new_context()
    for each in (context, alone):
        read(each, some_tokens(60))
    conversations = (tuple(some_tokens(9)), tuple(some_tokens(4)))
    repeat = sampled(alone)
    union = sampled(context, conversations)
    groups = 2
    for both, one in zip(union, repeat, strict=True):
        assert both.query.shape[1] == groups * (30 + 9 + 4)
        assert torch.equal(both.query[:, : groups * 30], one.query)


@pytest.mark.parametrize(
    "sources", [("self_study",), ("self_study", "live"), ("repeat", "self_study", "live")], ids=str
)
def test_self_study_serves_alone_and_with_others(new_context: NewContext, sources: tuple[str, ...]) -> None:
    context = new_context(reference_queries=sources, self_study_tokens=8)
    read(context, some_tokens(100))
    write(context, 10)
    assert context.records
    assert all(made.conversations for made in context.records)


def test_without_self_study_nothing_is_written(new_context: NewContext) -> None:
    context = new_context(reference_queries=BOTH)
    read(context, some_tokens(100))
    assert context.records
    assert not any(made.conversations for made in context.records)


def test_a_rebuild_reads_what_was_written_and_writes_nothing(
    new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = new_context(**STUDY)
    read(context, some_tokens(90))
    before = context.fork("before")
    read(context, some_tokens(60, seed=1))
    monkeypatch.setattr("am_memory.queries.sources.self_study", lambda *_args, **_options: pytest.fail("written anew"))
    rewind(context, 90)
    assert context.records == before.records
    assert_same_entries(context, before, atol=1e-4)


def test_a_branch_that_takes_self_study_up_can_be_rebuilt(new_context: NewContext) -> None:
    """The compactions that were made without it have no conversations, and are made again without."""
    context = new_context()
    read(context, some_tokens(150))
    branch = context.fork("branch", context.policy.model_copy(update=STUDY))
    for each in (context, branch):
        rewind(each, 90)
    assert branch.records
    assert_same_entries(branch, context, atol=1e-4)
    num_before = len(branch.records)
    read(branch, some_tokens(100, seed=1))
    assert [bool(made.conversations) for made in branch.records] == [
        number >= num_before for number in range(len(branch.records))
    ]


def test_live_queries_are_those_that_passed(new_context: NewContext) -> None:
    """However the tokens were read, and whatever was read on scratch in between."""
    in_pieces, at_once = new_context(reference_queries=LIVE), new_context(reference_queries=LIVE, chunk_tokens=512)
    tokens = some_tokens(60)
    read(in_pieces, tokens[:40])
    scratch_logits(in_pieces, some_tokens(9))
    read(in_pieces, tokens[40:])
    read(at_once, tokens)
    for one, other in zip(*(sampled(each) for each in (in_pieces, at_once)), strict=True):
        torch.testing.assert_close(one.query.sort(dim=1).values, other.query.sort(dim=1).values)
        torch.testing.assert_close(one.log_mass.sort(dim=1).values, other.log_mass.sort(dim=1).values)


def test_a_context_made_of_a_saved_cache_knows_where_its_live_queries_are(
    new_context: NewContext, engine: TransformersEngine
) -> None:
    """Positions were counted from 0, so that no later query was after any block: live queries never compacted again."""
    saved = new_context(reference_queries=LIVE)
    read(saved, some_tokens(50))
    cache = engine.new_cache()
    cache.restore(saved.cache.state())
    resumed = Context("resumed", engine, saved.policy, ignore, cache, OriginalStore(), list(saved.tokens), num_pinned=3)
    read(resumed, some_tokens(60, seed=1))
    assert resumed.records


def test_a_failed_step_gives_back_the_live_queries_that_it_pushed_out(new_context: NewContext) -> None:
    """Only so many are kept: what a failed step added had pushed out old ones, which its rollback did not bring back."""
    context = new_context(reference_queries=LIVE, trigger_tokens=1500)
    read(context, some_tokens(500))
    before = snapshot(context)
    with pytest.raises(RuntimeError), context.transaction():
        context.tokens.extend(some_tokens(400))
        context.read_all()
        raise RuntimeError
    assert snapshot(context) == before


# Branches


def test_a_branch_and_its_origin_do_not_see_each_other(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(90))
    before = snapshot(context)
    branch = context.fork("branch")
    assert snapshot(branch)[:2] == before[:2]
    read(branch, some_tokens(80, seed=1))
    assert snapshot(context) == before
    after = snapshot(branch)
    read(context, some_tokens(80, seed=2))
    assert snapshot(branch) == after


def test_two_branches_that_read_the_same_are_the_same(new_context: NewContext) -> None:
    context = new_context(reference_queries=BOTH)
    read(context, some_tokens(90))
    branch = context.fork("branch")
    for each in (context, branch):
        read(each, some_tokens(80, seed=1))
    assert_same_entries(context, branch)


def test_a_branch_keeps_what_its_origin_rewinds_and_overwrites(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(60))
    branch = context.fork("branch")
    before = snapshot(branch)
    rewind(context, 30)
    read(context, some_tokens(25, seed=1))
    assert snapshot(branch) == before


# Going back


def test_rewinding_exact_tokens_is_as_if_they_had_never_been_read(new_context: NewContext) -> None:
    context, other = new_context(), new_context()
    read(context, some_tokens(120))
    read(other, some_tokens(120))
    num_compactions, room = len(context.records), int(context.trigger_tokens - context.cache.kv_tokens)
    read(context, some_tokens(room, seed=1))
    assert len(context.records) == num_compactions > 0
    rewind(context, 120)
    assert context.tokens == other.tokens
    assert_same_entries(context, other)
    assert torch.equal(context.next_logits(), other.next_logits())


@pytest.mark.parametrize("reference_queries", [("repeat",), LIVE, BOTH], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40, 70, 130])
def test_rewinding_into_a_segment_gives_what_reading_that_far_gave(
    new_context: NewContext, num_tokens: int, reference_queries: tuple[str, ...]
) -> None:
    events: list[Event] = []
    context = new_context(notify=events.append, reference_queries=reference_queries)
    other = new_context(reference_queries=reference_queries)
    tokens = some_tokens(200)
    read(context, tokens)
    rewind(context, num_tokens)
    if num_tokens:
        read(other, tokens[:num_tokens])
    assert context.tokens == tokens[:num_tokens]
    assert context.records == other.records
    assert_same_entries(context, other, atol=1e-4)
    assert [event.num_tokens for event in events if isinstance(event, SessionRebuilt)] == [num_tokens]
    read(context, some_tokens(60, seed=3))
    assert context.cache.kv_tokens <= context.trigger_tokens


def test_rewinding_replays_compactions_that_no_trigger_asked_for(new_context: NewContext) -> None:
    context = new_context(trigger_tokens=1000)
    tokens = some_tokens(200)
    read(context, tokens[:50])
    context.compact(0.5)
    read(context, tokens[50:120])
    middle = context.fork("middle")
    read(context, tokens[120:])
    context.compact(1.0)
    rewind(context, 120)
    assert len(context.records) == 1
    assert_same_entries(context, middle, atol=1e-4)


def test_rewinding_over_a_generation_gives_what_was_before_it(new_context: NewContext) -> None:
    context = new_context()
    read(context, some_tokens(80))
    before = context.fork("before")
    write(context, 60)
    rewind(context, 80)
    assert context.tokens == before.tokens
    assert context.records == before.records
    assert_same_entries(context, before, atol=1e-4)


def test_rewinding_twice_goes_on_from_the_first(new_context: NewContext) -> None:
    context, other = new_context(), new_context()
    read(context, some_tokens(200))
    rewind(context, 150)
    rewind(context, 60)
    read(other, some_tokens(200)[:60])
    assert_same_entries(context, other, atol=1e-4)


def test_rewinding_a_full_sliding_window_reads_again(
    new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    """transformers calls a full window croppable: the layers before it were cut, and then it raised."""
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer)
    context, other = (Context("test", engine, POLICY, ignore, engine.new_cache(), OriginalStore()) for _ in range(2))
    read(context, some_tokens(60))
    rewind(context, 59)  # forgets what is not in the cache yet
    rewind(context, 50)
    read(other, some_tokens(60)[:50])
    torch.testing.assert_close(context.next_logits(), other.next_logits(), rtol=0, atol=1e-4)


# Events


def test_reading_in_chunks_reports_progress(new_context: NewContext) -> None:
    events: list[Event] = []
    read(new_context(notify=events.append, trigger_tokens=1000), some_tokens(50))
    assert [event for event in events] == [ReadProgress("test", done, 49) for done in (16, 32, 48, 49)]


def test_self_study_reports_its_progress_in_tokens(new_context: NewContext) -> None:
    events: list[Event] = []
    context = new_context(notify=events.append, **STUDY)
    read(context, some_tokens(50))
    events.clear()
    context.compact()
    stages = {stage: [(event.done, event.total) for event in group] for stage, group in by_stage(events)}
    assert list(stages) == ["self_study", "repeat", "score", "fit"]
    assert stages["self_study"][-1] == (8, 8)


def test_a_compaction_emits_at_most_ten_events_of_progress(engine: TransformersEngine, events: list[Event]) -> None:
    """A stream in mode "custom" got one for each head and piece, more than tokens of the answer."""
    Memory(engine, plain_policy(trigger_tokens=300), on_event=events.append).session("owl").append(list(range(200)) * 6)
    per_compaction = [0]
    for event in events:
        if isinstance(event, CompactionFinished):
            per_compaction.append(0)
        elif isinstance(event, CompactionProgress):
            per_compaction[-1] += 1
    assert len(per_compaction) > 2
    assert 0 < max(per_compaction) <= 10
    assert per_compaction[-1] == 0


def by_stage(events: list[Event]) -> Iterator[tuple[str, Iterator[CompactionProgress]]]:
    progress = [event for event in events if isinstance(event, CompactionProgress)]
    return groupby(progress, key=lambda event: event.stage)


def test_a_compaction_reports_its_start_its_stages_and_its_end(new_context: NewContext) -> None:
    events: list[Event] = []
    context = new_context(notify=events.append)
    read(context, some_tokens(70))
    kinds = [getattr(event, "stage", type(event).__name__) for event in events]
    first, last = kinds.index("CompactionStarted"), kinds.index("CompactionFinished")
    stages = {
        stage: [(event.done, event.total) for event in group] for stage, group in by_stage(events[first + 1 : last])
    }
    assert list(stages) == ["repeat", "score", "fit"]
    assert stages["repeat"] == [(16, 31), (31, 31)]  # tokens, in chunks of 16
    assert stages["score"] == [(1, 3), (2, 3), (3, 3)]  # layers
    assert stages["fit"][-1] == (6, 6)  # KV heads, as many at once as have about the same number of slots
    started = next(event for event in events if isinstance(event, CompactionStarted))
    report = next(event for event in events if isinstance(event, CompactionFinished)).report
    assert (started.start, started.end, started.kv_tokens) == (report.start, report.end, report.kv_tokens_before)
    assert report.kv_tokens_after < report.kv_tokens_before == 64
    assert report.kv_bytes_after < report.kv_bytes_before
    assert report.seconds > 0


def test_leaving_the_window_is_said_once(new_context: NewContext, engine: TransformersEngine) -> None:
    """It was said once for each chunk of a prompt that would leave it, and when the window was full but not left."""
    events: list[Event] = []
    context = new_context(notify=events.append)
    context.engine = copy.copy(engine)
    context.engine.info = replace(engine.info, window_tokens=100)
    read(context, some_tokens(101))
    assert not [event for event in events if isinstance(event, WindowExceeded)]
    read(context, some_tokens(150))
    write(context, 3)
    assert [event.window_tokens for event in events if isinstance(event, WindowExceeded)] == [100]


# Bad input


@pytest.mark.parametrize("bad", [260, 100_000, -1, "a", 1.5, None], ids=repr)
def test_what_is_no_token_id_is_refused(new_context: NewContext, bad: object) -> None:
    context = new_context()
    read(context, some_tokens(10))
    before = snapshot(context)
    with pytest.raises(InvalidInput, match=r"at position 3 is outside the vocabulary of 260; encode .* tokenizer"):
        read(context, [1, 2, 3, bad])
    assert snapshot(context) == before


# Failures


class Boom(Exception):
    """Nothing that the library knows."""


@contextmanager
def failing_layer(model: PreTrainedModel, at_call: int) -> Iterator[list[int]]:
    """The model's second layer raises at its nth call: the first layer has taken the tokens in by then."""
    calls = []

    def raise_at(*args: object) -> None:
        calls.append(len(calls) + 1)
        if calls[-1] == at_call:
            raise Boom

    hook = model.model.layers[1].register_forward_pre_hook(raise_at)
    try:
        yield calls
    finally:
        hook.remove()


STEPS: dict[str, Callable[[Context], None]] = {
    "append": lambda context: read(context, some_tokens(30, seed=5)),
    "generate": lambda context: write(context, 1),
    "compact": lambda context: atomic(context, context.compact),
    "rewind": lambda context: atomic(context, lambda: rewind(context, 70)),
}


def atomic(context: Context, step: Callable[[], object]) -> None:
    with context.transaction():
        step()


@pytest.fixture(scope="module")
def origin(engine: TransformersEngine) -> Context:
    """At its trigger, after compactions; tests go on with branches of it."""
    policy = POLICY.model_copy(update={"reference_queries": ("repeat", "self_study", "live"), "self_study_tokens": 4})
    context = Context("test", engine, policy, ignore, engine.new_cache(), OriginalStore(), num_pinned=3)
    read(context, some_tokens(110))
    read(context, some_tokens(int(context.trigger_tokens - context.cache.kv_tokens)))
    assert len(context.records) > 2
    return context


@pytest.mark.parametrize("name", STEPS)
def test_a_failure_in_any_forward_pass_changes_nothing(origin: Context, tiny_model: PreTrainedModel, name: str) -> None:
    step, untouched, context = STEPS[name], origin.fork("untouched"), origin.fork("test")
    before = snapshot(context)
    at_call = 1
    while True:
        with failing_layer(tiny_model, at_call) as calls:
            try:
                step(context)
            except Boom:
                assert snapshot(context) == before
            else:
                break
        at_call += 1
    assert at_call == len(calls) + 1 > 1
    step(untouched)
    assert snapshot(context)[:2] == snapshot(untouched)[:2]
    assert_same_entries(context, untouched, atol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_at_any_event_changes_nothing(origin: Context, name: str) -> None:
    """Events come between all stages of a step; the last one when all is done but the step itself."""
    step, context, events = STEPS[name], origin.fork("test"), []
    before = snapshot(context)

    def listen(event: Event) -> None:
        events.append(event)
        if len(events) == at_event:
            raise KeyboardInterrupt

    context.notify = listen
    for at_event in range(1, 1000):  # noqa: B007  read by the listener
        events.clear()
        try:
            step(context)
        except KeyboardInterrupt:
            assert snapshot(context) == before
        else:
            break
    assert at_event == len(events) + 1 > 5


@pytest.mark.parametrize("name", STEPS)
def test_an_interrupt_at_any_line_leaves_the_state_before_the_step_or_after_it(origin: Context, name: str) -> None:
    """Control-C strikes between any two lines: 20 of them, spread over the library's own lines of the step."""
    step, after = STEPS[name], origin.fork("after")
    with interrupted_at(None) as num_lines:
        step(after)
    expected = [snapshot(origin)[:2], snapshot(after)[:2]]
    for at_line in {round(1 + share / 19 * (num_lines[0] - 1)) for share in range(20)}:
        context = origin.fork("test")
        with interrupted_at(at_line), pytest.raises(KeyboardInterrupt):
            step(context)
        state = snapshot(context)[:2]
        assert state in expected
        assert_same_entries(context, origin if state == expected[0] else after, atol=1e-6)


@contextmanager
def interrupted_at(at_line: int | None) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the nth line of am_memory that runs; gives the lines counted."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Callable[..., object] | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == at_line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("place", ["scoring.exact_attention", "head_fits.fit"])
@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["host", "CUDA", "CPU allocator"],
)  # fmt: skip
def test_running_out_of_memory_says_what_to_do_and_changes_nothing(
    origin: Context, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    context = origin.fork("test")
    before = snapshot(context)

    def exhausted(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(f"am_memory.compaction.{place}", exhausted)
        for step in STEPS.values():
            with pytest.raises(
                CompactionFailed, match=r"out of memory while compacting \d+ tokens; .*lower trigger_tokens"
            ):
                step(context)
            assert snapshot(context) == before
    context.compact()


@pytest.mark.parametrize("part", ["value", "bias"])
def test_a_fit_that_is_not_finite_is_not_swapped_in(
    origin: Context, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    from am_memory.compaction import head_fits

    context = origin.fork("test")
    before, fit = snapshot(context), head_fits.fit

    def broken(*args: object, **kwargs: object) -> object:
        result = fit(*args, **kwargs)
        getattr(result, part)[-1, 0] = torch.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(head_fits, "fit", broken)
        with pytest.raises(CompactionFailed, match=r"not finite .*nothing was changed: .*raise policy.ridge"):
            STEPS["append"](context)
    assert snapshot(context) == before
    STEPS["append"](context)


def test_a_branch_that_goes_on_does_not_keep_its_parents_cache_alive(engine: TransformersEngine) -> None:
    """Every fork held the state that it began with, for good: kept branches took twice the bytes that they said."""
    memory = Memory(engine, MemoryPolicy(trigger_tokens=1000))
    parent = memory.scratch()
    parent.append(list(range(1, 60)))
    branch = parent.fork()
    branch.append([1, 2, 3])
    held = [weakref.ref(layer.buffer) for layer in layers_of(parent)]
    del parent
    gc.collect()
    assert [buffer() for buffer in held] == [None] * len(held)
