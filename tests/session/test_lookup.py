"""What a message, or the answer itself, looks for comes back by itself; and everything else stays as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import some_tokens
from inside import cache_of, context_of, records_of
from policies import plain_policy
from random_operations import differences
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, Sampling, Session
from am_memory.compaction.plan import Plan
from am_memory.engines.transformers import TransformersEngine
from am_memory.events import (
    CompactionFinished,
    Event,
    MemoryConsulted,
    SearchHeadsProgress,
    SpanPutAway,
    SpanRecalled,
    ignore,
)
from am_memory.session import lookup
from am_memory.session.rebuild import rebuild

POLICY = plain_policy(
    trigger_tokens=256, recall_tokens=120, keep_ratio=0.25, keep_recent=8, pinned=3, chunk_tokens=16, originals="host"
)
TRIGGER = 256
REST = TRIGGER - 120
GREEDY = Sampling(temperature=0)
QUESTION = [{"role": "user", "content": "Where does the owl sleep?"}]

NewMemory = Callable[..., Memory]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model looks for nothing: what it attends to most is recalled however little that is."""
    monkeypatch.setattr(lookup, "LEAST_SCORE", -1e20)


@pytest.fixture
def new_memory(engine: TransformersEngine, tmp_path: Path) -> NewMemory:
    def make(on_event: Callable[[Event], None] = ignore, engine: Any = engine, **changes: object) -> Memory:
        policy = POLICY.with_changes(**changes)
        return Memory(engine, policy, sampling=GREEDY, store=tmp_path / "store", on_event=on_event)

    return make


def told_session(memory: Memory, name: str = "alice", num_messages: int = 4) -> Session:
    """With some compacted messages and a question at the end."""
    session = memory.session(name)
    for number in range(num_messages):
        text = bytes(97 + token % 26 for token in some_tokens(90, seed=number)).decode()
        session.append([{"role": "user" if number % 2 == 0 else "assistant", "content": text}])
    session.append(QUESTION)
    assert len(session.segments) > 1
    return session


def answer(session: Session, count: int = 4) -> str:
    return "".join(piece.text for piece in session.generate(count))


def assert_equals_its_rebuild(session: Session) -> None:
    """Read token by token, to the bit."""
    rebuilt = context_of(session).fork("rebuilt")
    with rebuilt.transaction():
        rebuild(rebuilt, len(rebuilt.tokens), "a test")
    assert differences(context_of(session), rebuilt) == []


# When something is looked up


def test_nothing_comes_back_before_an_answer_is_asked_for(new_memory: NewMemory) -> None:
    assert told_session(new_memory()).recalled == ()


def test_a_question_brings_pages_back_and_says_so(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(events.append))
    answer(session, 1)
    (consulted,) = [event for event in events if isinstance(event, MemoryConsulted)]
    assert 0 < session.stats.recalled_tokens <= 120
    assert [(span.start, span.end) for span in consulted.spans] == sorted(session.recalled)
    assert all(span.text == session.engine.decode(session.tokens[span.start : span.end]) for span in consulted.spans)
    num_written = len(session.tokens) - consulted.at_tokens  # with the opening of the answer
    assert consulted.kv_tokens + num_written == pytest.approx(cache_of(session).kv_tokens, abs=1.01)


def test_pages_lie_in_segments_and_never_among_exact_tokens(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    answer(session, 1)
    for page in session.recalled:
        assert any(segment.start <= page.start < page.end <= segment.end for segment in session.segments)


def test_a_message_is_read_once(new_memory: NewMemory, engine: TransformersEngine) -> None:
    """It was read a second time for its queries, which was most of what a lookup cost."""
    counting, num_read = copy.copy(engine), [0]

    def forward(cache: Any, token_ids: Any, **options: Any) -> torch.Tensor:
        num_read[0] += len(token_ids)
        return engine.forward(cache, token_ids, **options)

    counting.forward = forward
    session = told_session(new_memory(engine=counting))
    answer(session, 1)  # measures the search heads
    session.compact(0.9)  # so that the answer has to make no room
    session.append(QUESTION)
    left, num_read[0] = len(session.tokens), 0
    answer(session, 1)
    assert session.recalled
    assert num_read[0] < len(session.tokens) - left + 2


def test_an_engine_that_hands_out_no_queries_finds_the_same(new_memory: NewMemory, engine: TransformersEngine) -> None:
    other = copy.copy(engine)
    other.capabilities = replace(engine.capabilities, free_query_tokens=None)
    pages = []
    for name, each in (("alice", engine), ("bob", other)):
        session = told_session(new_memory(engine=each, chunk_tokens=1), name)
        answer(session, 1)
        session.append(QUESTION)
        answer(session, 1)
        pages.append(session.recalled)
        assert (context_of(session).recent_queries is None) == (each is other)
    assert pages[0] == pages[1] != ()


def test_measuring_the_search_heads_is_reported(new_memory: NewMemory, engine: TransformersEngine) -> None:
    events: list[Event] = []
    fresh = copy.copy(engine)
    fresh.info = replace(engine.info, fingerprint="measured by nobody")
    answer(told_session(new_memory(events.append, engine=fresh)), 1)
    steps = [event for event in events if isinstance(event, SearchHeadsProgress)]
    assert [event.done_texts for event in steps] == list(range(1, steps[-1].total_texts + 1))


def test_what_finds_nothing_recalls_nothing(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "LEAST_SCORE", 1e9)
    session = told_session(new_memory(chunk_tokens=1))
    answer(session, 1)
    assert session.recalled == ()
    assert_equals_its_rebuild(session)


def test_a_text_that_has_nothing_before_it_looks_for_nothing(new_memory: NewMemory) -> None:
    """Compacted itself, and shorter than what is looked up: a search among no tokens raised an error."""
    session = new_memory(trigger_tokens=80, recall_tokens=20).session()
    session.append(some_tokens(100))
    assert session.segments
    assert lookup.MESSAGE_TOKENS > 100
    answer(session, 1)
    assert session.recalled == ()


def test_of_a_long_message_the_end_is_looked_up(new_memory: NewMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, span_scores = [], lookup.span_scores

    def scores(*args: Any) -> Any:
        starts.append(len(args[4]))  # the tokens that are searched
        return span_scores(*args)

    session = told_session(new_memory())
    session.append([{"role": "user", "content": "an owl, and " * 30}])
    num_tokens = len(session.tokens)
    monkeypatch.setattr(lookup, "span_scores", scores)
    answer(session, 1)
    (start,) = starts
    assert start == num_tokens - 1 - lookup.MESSAGE_TOKENS


def test_a_long_answer_looks_again(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(events.append))
    num_tokens = len(session.tokens)
    pieces = list(session.generate(2 * lookup.WRITING_TOKENS + 2))
    if len(pieces) <= 2 * lookup.WRITING_TOKENS:
        pytest.skip("the answer ended early")
    at_tokens = [event.at_tokens for event in events if isinstance(event, MemoryConsulted)]
    assert at_tokens
    assert at_tokens[0] == num_tokens
    opening = at_tokens[1] - num_tokens - lookup.WRITING_TOKENS
    assert 0 < opening < 20
    assert {(at - opening - num_tokens) % lookup.WRITING_TOKENS for at in at_tokens[1:]} == {0}


def test_without_room_for_recalls_nothing_comes_back_by_itself(new_memory: NewMemory) -> None:
    session = told_session(new_memory(recall_tokens=0, trigger_tokens=REST))
    answer(session, 70)
    assert session.recalled == ()
    (span,) = session.search("Where?", top=1)
    assert session.recall(span)


def test_plain_text_is_looked_up_as_well(new_memory: NewMemory) -> None:
    session = new_memory().session()
    session.append("An owl sleeps in the barn, and a swallow under its roof. " * 8)
    answer(session, 1)
    assert session.recalled
    assert not session.messages


def test_a_model_without_a_chat_template_looks_up_too(
    new_memory: NewMemory, tiny_model: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    engine = TransformersEngine(tiny_model, tokenizer)
    assert not engine.has_chat_template
    session = new_memory(engine=engine).session()
    session.append("An owl sleeps in the barn, and a swallow under its roof. " * 8)
    assert session.search("Where does the owl sleep?", top=1)
    answer(session, 1)
    assert session.recalled


# What a look changes, and what it does not


def write(session: Session, token_ids: Sequence[int]) -> None:
    """An answer of given tokens, with the lookups that an answer has."""
    context = context_of(session)
    lookup.recall_for_answer(context)
    for number, token_id in enumerate(token_ids):
        context.next_logits(keeps_room=True)
        context.tokens.append(token_id)
        if number % lookup.WRITING_TOKENS == 1:
            lookup.recall_while_writing(context)


def test_recalls_change_nothing_about_when_compactions_come(new_memory: NewMemory) -> None:
    plans: list[list[tuple[int, int, Plan]]] = []
    for least_score in (lookup.LEAST_SCORE, math.inf):  # the second one recalls nothing
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lookup, "LEAST_SCORE", least_score)
            session = told_session(new_memory(), name=f"least-{least_score}")
            write(session, some_tokens(150, seed=8))
            session.append(some_tokens(100, seed=9))
        assert any(record.recalls for record in records_of(session)) == (least_score < math.inf)
        plans.append([(made.at_tokens, made.lag_tokens, made.plan) for made in records_of(session)])
    assert plans[0] == plans[1]


def test_what_is_read_may_take_the_room_for_pages_and_an_answer_makes_it_free(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    assert session.stats.num_compactions
    session.compact()
    session.append(some_tokens(TRIGGER - 2 - int(session.stats.kv_tokens), seed=9))
    num_compactions = session.stats.num_compactions
    assert session.stats.kv_tokens > REST
    answer(session, 1)
    assert session.stats.num_compactions > num_compactions
    assert context_of(session).tokens_at_rest <= REST
    assert session.stats.kv_tokens <= TRIGGER


@pytest.mark.parametrize("changes", [{}, {"ahead_tokens": 12}, {"segment_dtype": "int8"}], ids=str)
def test_the_cache_is_never_above_the_trigger(new_memory: NewMemory, changes: dict[str, Any]) -> None:
    session = told_session(new_memory(**changes))
    sizes, rests = [], []
    for _ in range(3):
        for _ in session.generate(100):
            sizes.append(cache_of(session).kv_tokens)
            rests.append(context_of(session).tokens_at_rest)
        session.append([{"role": "user", "content": "owl " * 20}])
        sizes.append(cache_of(session).kv_tokens)
    assert max(rests) <= REST < max(sizes) <= 256


def test_pages_stay_through_a_compaction_in_the_middle_of_an_answer(new_memory: NewMemory) -> None:
    events: list[Event] = []
    session = told_session(new_memory(events.append))
    pieces = session.generate(lookup.WRITING_TOKENS)
    next(pieces)
    pages = session.recalled
    assert pages
    num_compactions = session.stats.num_compactions
    for _ in pieces:
        assert session.recalled == pages
    assert session.stats.num_compactions > num_compactions
    since = events[max(i for i, event in enumerate(events) if isinstance(event, CompactionFinished)) :]
    assert [(event.start, event.end) for event in since if isinstance(event, SpanRecalled)] == list(pages)


@pytest.mark.parametrize("changes", [{}, {"ahead_tokens": 12}, {"reference_queries": ("repeat", "live")}], ids=str)
def test_what_was_written_beside_pages_is_rebuilt_to_the_bit(new_memory: NewMemory, changes: dict[str, Any]) -> None:
    session = told_session(new_memory(chunk_tokens=1, **changes))
    answer(session, 90)
    session.append(QUESTION)
    answer(session, 10)
    assert session.recalled
    assert_equals_its_rebuild(session)


def test_a_window_that_cannot_go_back_is_rebuilt_as_well(
    new_memory: NewMemory, new_sliding_model: Callable[[], PreTrainedModel], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TransformersEngine(new_sliding_model(), byte_tokenizer)
    session = told_session(new_memory(engine=engine, chunk_tokens=1))
    assert not cache_of(session).is_croppable
    answer(session, 20)
    assert session.recalled
    assert_equals_its_rebuild(session)


def test_a_rewind_to_before_the_answer_asks_again(new_memory: NewMemory) -> None:
    session = told_session(new_memory(chunk_tokens=1))
    num_tokens = len(session.tokens)
    first = answer(session, 8)
    pages = session.recalled
    session.rewind(num_tokens)
    assert answer(session, 8) == first
    assert session.recalled == pages


# Saved, branched, interrupted


def test_a_resumed_session_answers_as_the_saved_one(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    answer(session, 8)
    assert session.recalled
    session.save()
    resumed = new_memory().session("alice")
    assert resumed.recalled == session.recalled
    assert answer(resumed, 80) == answer(session, 80)
    assert resumed.tokens == session.tokens
    assert resumed.recalled == session.recalled


def test_what_was_recalled_beside_a_running_compaction_is_recalled_there_again(new_memory: NewMemory) -> None:
    """The tokens since the compaction began are read again, and saw the page from the first of them on."""
    memory = new_memory(ahead_tokens=20, chunk_tokens=1)
    session, other = told_session(memory), told_session(memory, "other")
    for each in (session, other):
        while context_of(each).background_compaction is not None:
            each.append([7])
        while context_of(each).background_compaction is None:
            each.append([7])
        each.append(some_tokens(5, seed=3))
        (span,) = each.search("Where?", top=1)
        each.recall(span)
        each.append(some_tokens(3, seed=4))
        assert context_of(each).background_compaction is not None
        assert context_of(each).recalled
    session.save()
    resumed = new_memory(ahead_tokens=20, chunk_tokens=1).session("alice")
    assert torch.equal(resumed.logits("owl"), other.logits("owl"))
    assert answer(resumed, 60) == answer(other, 60)
    assert differences(context_of(resumed), context_of(other)) == []


def test_a_branch_looks_up_for_itself(new_memory: NewMemory) -> None:
    session = told_session(new_memory())
    branch = session.fork("branch")
    answer(branch, 8)
    assert branch.recalled
    assert session.recalled == ()
    second = branch.fork("second")
    assert second.recalled == branch.recalled
    second.append(some_tokens(200, seed=5))
    assert answer(session, 8) == session.engine.decode(branch.tokens[-8:], skip_special=True)
    assert session.recalled == branch.recalled


@pytest.mark.parametrize("kind", [SpanRecalled, MemoryConsulted, SpanPutAway])
def test_a_look_that_is_interrupted_leaves_the_session_as_it_was(new_memory: NewMemory, kind: type) -> None:
    is_armed = False

    def fail(event: Event) -> None:
        if is_armed and isinstance(event, kind):
            raise RuntimeError("a listener failed")

    session, other = told_session(new_memory(fail)), told_session(new_memory(), "other")
    for each in (session, other):
        answer(each, 2)
        each.append([{"role": "user", "content": "And what of the swallow under the roof of the barn?"}])
    before, is_armed = context_of(session).fork("before"), True
    try:
        answer(session, 2)
    except RuntimeError:
        assert differences(context_of(session), before) == []
    else:
        assert kind is SpanPutAway
    is_armed = False
    if kind is not SpanPutAway:
        assert answer(session, 20) == answer(other, 20)
        assert torch.equal(session.logits("owl"), other.logits("owl"))
