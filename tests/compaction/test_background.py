"""A compaction beside decoding: the tokens are those of one that is waited for, and nothing else can tell."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from driven import read, some_tokens, write
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from inside import context_of, pending_of
from policies import tight_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy, Sampling
from am_memory.compaction.background import BackgroundCompaction
from am_memory.compaction.job import CompactionJob, CompactionResult
from am_memory.engines.llama_cpp import LlamaCppEngine
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidPolicy
from am_memory.events import CompactionFinished, CompactionProgress, CompactionStarted, Event, ignore
from am_memory.recall.original_store import OriginalStore
from am_memory.recall.paging import Page
from am_memory.session.context import Context
from am_memory.session.jobs import repeated_compaction
from am_memory.session.rebuild import compacted_after, read_untriggered, rebuild, rewind
from am_memory.session.recalling import recall

POLICY = tight_policy(head_budget="adaptive", ahead_tokens=12)
BEGINS_AT, TRIGGER, SINCE = 84, 96, 5
GREEDY = Sampling(temperature=0)

NewContext = Callable[..., Context]


@pytest.fixture
def new_context(engine: TransformersEngine) -> NewContext:
    def make(
        policy: MemoryPolicy = POLICY,
        notify: Callable[[Event], None] = ignore,
        engine: TransformersEngine = engine,
        **changes: object,
    ) -> Context:
        policy = policy.model_copy(update=changes)
        return Context("test", engine, policy, notify, engine.new_cache(), OriginalStore(), num_pinned=policy.num_sinks)

    return make


def held(context: Context) -> list[Tensor]:
    """Every entry in the cache, copied."""
    entries = []
    for layer in context.cache.compactable:
        entries += [of.clone() for of in layer.exact_entries(layer.start, layer.start + layer.length)]
        if layer.slots is not None:
            entries += [of.clone() for of in (*layer.slots.tensors, layer.slots.positions, layer.slots.ranks)]
    return entries


def assert_same(one: Context, other: Context, atol: float = 0) -> None:
    assert one.tokens == other.tokens
    assert one.records == other.records
    for mine, theirs in zip(held(one), held(other), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def with_one_pending(context: Context) -> Context:
    """`SINCE` tokens after it was begun."""
    read(context, some_tokens(BEGINS_AT + 1))
    assert context.background_compaction is None
    write(context, SINCE)
    assert context.background_compaction is not None
    assert context.background_compaction.at_tokens == BEGINS_AT
    assert context.records == []
    return context


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("am-memory-ahead")]


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on nothing is read while a compaction is made."""

    class Waited(BackgroundCompaction):
        def start(self) -> None:
            super().start()
            wait([self._future])

    return lambda: monkeypatch.setattr("am_memory.session.context.BackgroundCompaction", Waited)


class Gate:
    """Holds up whoever makes a compaction in another thread, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.num_made, run = threading.Event(), 0, CompactionJob.run

        def held_up(job: CompactionJob, progress: Callable[[str, int, int], None]) -> CompactionResult:
            self.num_made += 1
            while threading.current_thread() is not threading.main_thread() and not self.opened.wait(0.01):
                progress("repeat", 0, 1)
            return run(job, progress)

        monkeypatch.setattr(CompactionJob, "run", held_up)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture(autouse=True)
def _alone() -> None:
    """Without threads of other tests, whose contexts nobody has any more."""
    for thread in workers():
        thread.join()


# What comes out


def test_decoding_goes_on_while_it_is_made(new_context: NewContext, gate: Gate) -> None:
    context = with_one_pending(new_context())
    write(context, TRIGGER - BEGINS_AT - SINCE)
    assert context.cache.kv_tokens == TRIGGER
    assert context.records == []
    gate.opened.set()
    write(context, 1)
    (entry,) = context.records
    assert (entry.at_tokens, entry.swapped_at) == (BEGINS_AT, TRIGGER)
    assert entry.plan.newest.end <= BEGINS_AT - POLICY.keep_recent
    assert context.background_compaction is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reference_queries": ("repeat", "live")},
        {"reference_queries": ("repeat", "self_study"), "self_study_tokens": 8},
        {"experiments": Experiments(on_policy=True)},
        {"experiments": Experiments(summary_tokens=8)},
        {"experiments": Experiments(recompaction="refit"), "keep_ratio": 0.5},
        {"max_error": 0.01},
        {"segment_dtype": "int8", "originals": "host", "recall_tokens": 0},
        {"key_selection": "omp_fast"},
    ],
    ids=str,
)
def test_tokens_are_those_of_one_that_is_made_at_once_and_swapped_in_as_late(
    new_context: NewContext, changes: dict[str, object]
) -> None:
    policy = MemoryPolicy(**{**POLICY.model_dump(), **changes})
    context = new_context(policy)
    read(context, some_tokens(60))
    write(context, 200)
    assert [entry.lag_tokens for entry in context.records] == [POLICY.ahead_tokens] * len(context.records)
    assert len(context.records) > 3
    once = new_context(policy, ahead_tokens=0)
    once.tokens = list(context.tokens)
    for entry in context.records:  # in this thread, on the cache itself
        read_untriggered(once, entry.at_tokens)
        made = repeated_compaction(once, once.cache, [entry]).run(once.progress)
        read_untriggered(once, entry.swapped_at)
        once.swap_in(made)
    assert once.records == context.records
    torch.testing.assert_close(once.next_logits(), context.next_logits(), rtol=0, atol=1e-3)


steps = st.lists(st.tuples(st.booleans(), st.integers(1, 100)), min_size=1, max_size=3)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=steps,
    trigger_tokens=st.integers(40, 100),
    ahead_tokens=st.integers(1, 30),
    compact_fraction=st.sampled_from([0.4, 0.5, 0.8, 1.0]),
    keep_ratio=st.sampled_from([0.05, 0.25, 0.9, 1.0]),
    keep_recent=st.integers(0, 8),
    chunk_tokens=st.sampled_from([1, 7, 512]),
    experiments=st.sampled_from([Experiments(), Experiments(), Experiments(recompaction="refit")]),
)
def test_the_clock_decides_nothing_and_the_cache_never_exceeds_the_trigger(
    new_context: NewContext, steps: list[tuple[bool, int]], **values: object
) -> None:
    try:
        context, other = (new_context(MemoryPolicy(**values, pinned=2)) for _ in range(2))
    except InvalidPolicy:
        reject()
    for is_read, count in steps:
        for each in (context, other):
            if is_read or not each.tokens:
                read(each, some_tokens(count))
            else:
                write(each, count // 4)
            assert each.cache.kv_tokens <= each.trigger_tokens
            if each is other and each.background_compaction is not None:
                wait([each.background_compaction._future])
    assert_same(context, other)
    rebuild(context, len(context.tokens), "a test")
    torch.testing.assert_close(context.next_logits(), other.next_logits(), rtol=0, atol=1e-3)


def test_a_rebuild_has_it_pending_at_the_same_place(new_context: NewContext) -> None:
    context = with_one_pending(new_context())
    other = with_one_pending(new_context())
    rebuild(context, len(context.tokens), "a test")
    assert context.background_compaction.at_tokens == BEGINS_AT
    for each in (context, other):
        write(each, 60)
    assert_same(context, other, atol=1e-4)


def test_the_second_one_is_begun_at_once_where_the_first_leaves_no_room(new_context: NewContext) -> None:
    context = new_context(keep_ratio=1.0, max_compact_tokens=24)
    read(context, some_tokens(200))
    assert context.cache.kv_tokens <= TRIGGER
    again = new_context(keep_ratio=1.0, max_compact_tokens=24)
    read(again, some_tokens(200))
    assert_same(context, again)


def test_generate_of_transformers_swaps_it_in_as_well(
    engine: TransformersEngine, tiny_model: PreTrainedModel, waited_for: Callable[[], None]
) -> None:
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258, "max_new_tokens": 150}
    prompt, outputs, events = torch.tensor([some_tokens(60)]), [], []
    for prepare in (lambda: None, waited_for):
        prepare()
        memory = Memory(engine, POLICY, on_event=events.append)
        outputs.append(tiny_model.generate(prompt, cache=memory.cache(), **how).tolist())
    assert outputs[0] == outputs[1]
    assert sum(isinstance(event, CompactionFinished) for event in events) >= 4


def test_listeners_are_called_in_the_thread_that_decodes(new_context: NewContext) -> None:
    threads, events = set(), []

    def notify(event: Event) -> None:
        threads.add(threading.current_thread())
        events.append(event)

    context = with_one_pending(new_context(notify=notify))
    write(context, 10)
    assert threads == {threading.main_thread()}
    kinds = [type(event) for event in events]
    first, last = kinds.index(CompactionStarted), kinds.index(CompactionFinished)
    assert {event.stage for event in events[first:last] if isinstance(event, CompactionProgress)} == {
        "repeat",
        "score",
        "fit",
    }
    assert events[last].report.kv_tokens_before == TRIGGER


# Steps that fail


def fail_after(context: Context, count: int) -> None:
    with pytest.raises(ZeroDivisionError), context.transaction():
        for _ in range(count):
            context.tokens.append(int(context.next_logits().argmax()))
        raise ZeroDivisionError


def test_a_step_that_fails_afterwards_leaves_it_under_way(new_context: NewContext) -> None:
    context, other = (with_one_pending(new_context()) for _ in range(2))
    pending = context.background_compaction
    fail_after(context, 3)
    assert context.background_compaction is pending
    fail_after(context, 20)  # swapped in, and taken back
    assert context.background_compaction is pending
    assert context.records == []
    for each in (context, other):
        write(each, 30)
    assert_same(context, other)


def test_a_step_that_is_taken_back_takes_back_what_it_began(new_context: NewContext, gate: Gate) -> None:
    context, other = new_context(), new_context()
    for each in (context, other):
        read(each, some_tokens(BEGINS_AT + 1))
    fail_after(context, 3)
    assert context.background_compaction is None
    assert workers() == []
    gate.opened.set()
    for each in (context, other):
        write(each, 30)
    assert_same(context, other)


def test_a_failure_shows_where_it_would_be_swapped_in_and_the_next_attempt_works(
    new_context: NewContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object, **kwargs: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("am_memory.compaction.scoring.exact_attention", exhausted)
        context = with_one_pending(new_context())
        write(context, TRIGGER - BEGINS_AT - SINCE)
        before = context.cache.state(), list(context.tokens)
        with pytest.raises(CompactionFailed, match=r"out of memory while compacting \d+ tokens; nothing was changed"):
            write(context, 1)
        assert (context.cache.state(), context.tokens, context.records) == (*before, [])
        with pytest.raises(CompactionFailed, match="out of memory"):
            write(context, 1)
    write(context, 30)
    assert [(entry.at_tokens, entry.lag_tokens) for entry in context.records][:1] == [(TRIGGER, 0)]


# All that is not reading on


def test_rewinding_to_before_it_began_gives_it_up_and_to_later_does_not(new_context: NewContext, gate: Gate) -> None:
    context = with_one_pending(new_context())
    pending = context.background_compaction
    with context.transaction():
        rewind(context, BEGINS_AT + 3)
    assert context.background_compaction is pending
    with context.transaction():
        rewind(context, BEGINS_AT)
    assert context.background_compaction is None
    assert workers() == []
    gate.opened.set()
    again = new_context()
    read(again, context.tokens)
    for each in (context, again):
        write(each, 30)
    assert_same(context, again, atol=1e-4)


def test_rewinding_behind_where_it_was_swapped_in_finds_it_under_way_again(new_context: NewContext) -> None:
    context, other = (with_one_pending(new_context()) for _ in range(2))
    num_tokens = len(context.tokens)
    write(context, 40)
    assert compacted_after(context, num_tokens)
    rebuild(context, num_tokens, "a test")
    assert context.records == []
    for each in (context, other):
        write(each, 40)
    assert_same(context, other, atol=1e-4)


def test_a_branch_shares_it(new_context: NewContext, gate: Gate) -> None:
    context = with_one_pending(new_context())
    branch, smaller = context.fork("branch"), context.fork("smaller", POLICY.model_copy(update={"keep_ratio": 0.2}))
    assert smaller.background_compaction is None
    context.cancel_background_compaction()
    gate.opened.set()
    write(branch, 20)
    assert gate.num_made == 1
    undisturbed = with_one_pending(new_context())
    write(undisturbed, 20)
    assert_same(branch, undisturbed)


def test_compacting_now_swaps_it_in_and_by_a_fraction_gives_it_up(new_context: NewContext) -> None:
    context, other = (with_one_pending(new_context()) for _ in range(2))
    with context.transaction():
        context.compact()
    assert [(entry.at_tokens, entry.lag_tokens) for entry in context.records] == [(BEGINS_AT, SINCE)]
    with other.transaction():
        other.compact(0.3)
    assert [(entry.at_tokens, entry.lag_tokens) for entry in other.records] == [(BEGINS_AT + SINCE, 0)]
    for each in (context, other):
        assert each.background_compaction is None
        write(each, 60)
        logits = each.next_logits()
        rebuild(each, len(each.tokens), "a test")
        torch.testing.assert_close(each.next_logits(), logits, rtol=0, atol=1e-3)


def test_what_is_recalled_stays_while_one_is_made_that_sees_none_of_it(new_context: NewContext) -> None:
    context, other = (new_context(originals="host", trigger_tokens=160, recall_tokens=32) for _ in range(2))
    for each in (context, other):
        read(each, some_tokens(150))
    page = Page(20, 40)
    with context.transaction():
        assert recall(context, *page) == [page]
    for token in some_tokens(100, seed=1):
        for each in (context, other):
            read(each, [token])
    assert context.background_compaction is not None or context.records[-1].lag_tokens
    assert [recalled.page for recalled in context.recalled] == [page]
    assert [(made.at_tokens, made.lag_tokens, made.plan) for made in context.records] == [
        (made.at_tokens, made.lag_tokens, made.plan) for made in other.records
    ]
    assert len(context.records) > 2


@pytest.mark.parametrize("is_sliding", [False, True])
def test_saving_and_loading_changes_no_token(
    engine: TransformersEngine,
    new_sliding_model: Callable[[], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    is_sliding: bool,
) -> None:
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer) if is_sliding else engine
    memory = Memory(engine, POLICY, sampling=GREEDY, store=tmp_path)
    alice, undisturbed = memory.session("alice"), memory.session("undisturbed")
    for each in (alice, undisturbed):
        each.append(some_tokens(BEGINS_AT + 1))
        with context_of(each).transaction():
            write(context_of(each), SINCE)
    pending = pending_of(alice)
    assert pending is not None
    alice.save()
    assert pending_of(alice) is pending
    loaded = Memory(engine, POLICY, sampling=GREEDY, store=tmp_path).session("alice")
    assert loaded.tokens == alice.tokens
    for each in (alice, undisturbed, loaded):
        with context_of(each).transaction():
            write(context_of(each), 60)
    assert_same(context_of(alice), context_of(undisturbed))
    assert_same(context_of(loaded), context_of(undisturbed), atol=1e-4)


def test_a_session_that_is_deleted_leaves_no_thread(engine: TransformersEngine, gate: Gate) -> None:
    memory = Memory(engine, POLICY)
    session = memory.session("alice")
    session.append(some_tokens(BEGINS_AT + 4))
    assert len(workers()) == 1
    memory.delete("alice")
    assert workers() == []


# What it cannot do


@pytest.mark.parametrize(("ahead_tokens", "block", "possible"), [(18, 14, 14), (60, 0, 14), (1000, 0, 14)], ids=str)
def test_beginning_too_early_is_refused_with_what_is_possible(
    new_context: NewContext, ahead_tokens: int, block: int, possible: int
) -> None:
    with pytest.raises(
        InvalidPolicy,
        match=rf"ahead_tokens {ahead_tokens} must be below the {block} tokens .*trigger of 96, .*: lower it to {possible},",
    ):
        new_context(ahead_tokens=ahead_tokens)
    new_context(ahead_tokens=possible)


def test_llama_cpp_is_refused(shared_llama: LlamaCppEngine) -> None:
    with pytest.raises(InvalidPolicy, match="ahead_tokens 12 needs an engine that reads into two caches at once"):
        Memory(shared_llama, POLICY.model_copy(update={"head_budget": "auto"}))


@pytest.mark.gpu
def test_on_a_gpu_another_stream_makes_the_same(
    new_tiny_model: Callable[[], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerBase,
    waited_for: Callable[[], None],
) -> None:
    engine = TransformersEngine(new_tiny_model().to("cuda"), byte_tokenizer)
    contexts = []
    for prepare in (lambda: None, waited_for):
        prepare()
        contexts.append(
            Context("test", engine, POLICY, ignore, engine.new_cache(), OriginalStore(), num_pinned=POLICY.num_sinks)
        )
        read(contexts[-1], some_tokens(60))
        write(contexts[-1], 300)
    assert len(contexts[0].records) > 4
    assert_same(*contexts, atol=1e-4)
