"""Search among compacted tokens: what it finds, and that a score is what its definition gives."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from driven import some_tokens
from inside import cache_of, context_of, originals_of, state_of
from policies import originals_policy, plain_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, Sampling, Session
from am_memory.cli.letters import facts, hide
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput, InvalidPolicy
from am_memory.policy import MIN_PAGE_TOKENS
from am_memory.recall import search
from am_memory.recall.search import PASSAGE_TOKENS, Sought, span_scores
from am_memory.recall.search_heads import SPAN_TOKENS, lift, search_heads
from am_memory.recall.search_index import Spans, index_bytes
from am_memory.recall.search_queries import read_on_scratch
from am_memory.recall.words import word_numbers, word_scores

POLICY = originals_policy()

NewSession = Callable[..., Session]


@pytest.fixture
def new_session(engine: TransformersEngine) -> NewSession:
    def make(count: int = 400, window: int | None = None, **changes: object) -> Session:
        mine = copy.copy(engine)
        if window is not None:
            mine.info = replace(engine.info, window_tokens=window)
        session = Memory(mine, POLICY.with_changes(**changes), sampling=Sampling(temperature=0)).session("alice")
        session.append(some_tokens(count))
        assert session.segments
        return session

    return make


def test_searching_leaves_the_session_as_it_was(new_session: NewSession) -> None:
    session = new_session()
    session.search("who?")  # takes the keys that all searches compare
    before, stats = state_of(session), session.stats
    session.search("what?")
    assert session.stats == stats
    for mine, theirs in zip(state_of(session).layers, before.layers, strict=True):
        assert torch.equal(mine.buffer.key[:, :, : mine.length], theirs.buffer.key[:, :, : theirs.length])
        assert all(torch.equal(one, other) for one, other in zip(mine.slots.fields, theirs.slots.fields, strict=True))


def test_spans_lie_in_segments_and_do_not_overlap(new_session: NewSession) -> None:
    session = new_session()
    spans = sorted((span.start, span.end) for span in session.search("what?", top=1000))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for start, end in spans:
        assert any(segment.start <= start < end <= segment.end for segment in session.segments)
    assert sum(end - start for start, end in spans) == session.segments[-1].end - 3


def test_the_best_spans_come_first_with_their_text(new_session: NewSession) -> None:
    session = new_session()
    best = session.search("what?", top=3)
    assert 0 < len(best) <= 3
    assert [span.score for span in best] == sorted((span.score for span in best), reverse=True)
    assert all(span.text == session.engine.decode(session.tokens[span.start : span.end]) for span in best)


def test_a_span_that_was_found_can_be_recalled(new_session: NewSession) -> None:
    session = new_session()
    (span,) = session.search("what?", top=1)
    assert session.recall(span) == [(span.start, span.end)]


def test_before_anything_is_compacted_nothing_is_found(engine: TransformersEngine) -> None:
    session = Memory(engine, POLICY).session("alice")
    session.append(some_tokens(60))
    assert session.search("what?") == []


@pytest.mark.parametrize(("text", "top", "words"), [("  ", 5, "nothing to search for"), ("what?", 0, "top is 0")])
def test_a_bad_search_is_refused(new_session: NewSession, text: str, top: int, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        new_session(160).search(text, top)


def keys_by_position(session: Session, layer_index: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, biases and positions of all that a search may find at one KV head."""
    cache, found = cache_of(session), []
    layer, covered = cache.compactable[layer_index], set[int]()
    for segment in session.segments:
        for original in originals_of(session):
            if segment.start <= original.start < segment.end:
                key = layer.rotated(original.layers()[layer_index][0][head][None], segment.shift)[0]
                found.append((key, torch.zeros(len(key)), torch.arange(original.start, original.end)))
                covered.update(range(original.start, original.end))
    slots = layer.slots.head(head)
    slots = slots.where(
        torch.tensor([p >= cache.num_pinned_slots and p not in covered for p in slots.positions.tolist()])
    )
    found.append((slots.key, slots.bias, slots.positions.long()))
    tail = range(cache.tail_start, cache.num_tokens)
    found.append((layer.exact_entries(tail.start, tail.stop)[0][head], torch.zeros(len(tail)), torch.tensor(tail)))
    keys, biases, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
    return keys.float(), biases.float(), positions


def span_shares(query: Tensor, key: Tensor, bias: Tensor, span_of_key: Tensor, num_spans: int) -> Tensor:
    """(num_queries, num_spans): the share of the attention that each span gets."""
    return torch.zeros(len(query), num_spans).index_add(1, span_of_key, (query @ key.T + bias).softmax(-1))


@pytest.mark.parametrize("first_look", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"originals": "drop"}, {"window": 160, "trigger_tokens": 64}], ids=["originals", "slots", "moved"]
)
def test_a_score_is_what_the_definition_gives(
    new_session: NewSession, changes: dict[str, object], first_look: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a softmax over every key, one search head at a time; also if a first look chose every span."""
    if first_look:
        monkeypatch.setattr(search, "EXACT_SPANS", 1)
        monkeypatch.setattr(search, "EXACT_SHARE", 1.0)
    monkeypatch.setattr(search, "usual_distance", lambda distance: distance)
    session = new_session(**changes)
    if "window" in changes:
        assert session.segments[0].shift > 0
    context, cache, engine = context_of(session), cache_of(session), session.engine
    num_tokens, found = cache.num_tokens, search_heads(engine)
    asked = some_tokens(45, seed=9)
    text = read_on_scratch(engine, cache, found.heads, asked, 64).at(range(num_tokens, num_tokens + len(asked)))
    token_ids, lifts = list(session.tokens[:num_tokens]), []
    for index, head in enumerate(found.heads):
        key, bias, positions = keys_by_position(session, head.layer, head.head)
        layer = cache.compactable[head.layer]
        usual = layer.rotated(found.usual[index][None], num_tokens - found.position)[0].float()
        spans = positions // SPAN_TOKENS, -(-num_tokens // SPAN_TOKENS)
        of_text = span_shares(text[index], key * layer.scaling, bias, *spans)
        usually = span_shares(usual, key * layer.scaling, bias, *spans).mean(0)
        of_passages = torch.split(of_text, PASSAGE_TOKENS)
        lifts.append(torch.stack([lift(passage.mean(0), usually) for passage in of_passages]))
    runs = [(word_numbers(engine, token_ids[part.start : part.end]), part.start) for part in context.originals]
    passages = torch.split(word_numbers(engine, asked), PASSAGE_TOKENS)
    by_words = word_scores(passages, runs, -(-num_tokens // SPAN_TOKENS))
    assert bool(by_words.any()) == bool(runs)
    expected = (torch.stack(lifts).mean(0) + by_words).amax(0)
    scores = span_scores(engine, cache, context.originals, Sought(asked, text), token_ids)
    is_compact = scores > -torch.inf
    torch.testing.assert_close(scores[is_compact], expected[is_compact], rtol=1e-3, atol=1e-4)
    assert int(is_compact.sum()) == -(-session.segments[-1].end // SPAN_TOKENS)


def test_a_first_look_leaves_out_all_but_the_best_spans(
    new_session: NewSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = new_session()
    exact = session.search("what?", top=1000)
    monkeypatch.setattr(search, "EXACT_SPANS", 5)
    monkeypatch.setattr(search, "EXACT_SHARE", 0.0)
    best = [span for span in session.search("what?", top=1000) if span.score > search.MIN_SCORE]
    assert 0 < sum(span.end - span.start for span in best) < sum(span.end - span.start for span in exact) * 0.75
    assert max(span.score for span in best) == pytest.approx(exact[0].score, abs=0.2)


def test_means_of_keys_stand_for_the_keys_that_are_there() -> None:
    """The first and the last span of a run hold fewer keys than the others."""
    key = torch.randn(37, 8)
    rough = Spans.of(key, 5).rough()
    assert rough.keys.shape == (3, SPAN_TOKENS // 4, 8)
    assert rough.bias.exp().sum() == pytest.approx(37)
    torch.testing.assert_close(rough.keys[0, 1], key[:3].mean(0))
    torch.testing.assert_close((rough.keys * rough.bias.exp()[..., None]).sum((0, 1)), key.sum(0))


@pytest.mark.parametrize(("room", "longest"), [(15, 0), (16, 16), (20, 20), (47, 46), (52, 52), (56, 56)])
def test_a_small_room_holds_a_smaller_page(new_session: NewSession, room: int, longest: int) -> None:
    """A room of less than 48 tokens was kept free, and nothing came back in it."""
    session = new_session()
    scores = torch.zeros(-(-session.segments[-1].end // SPAN_TOKENS))
    scores[2] = 1.0
    pages = search.best_pages(
        session.engine, session.tokens, session.segments, scores, least_score=0.5, max_tokens=room
    )
    num_tokens = sum(page.num_tokens for page in pages)
    assert (40 if room > 48 else longest) <= num_tokens <= longest


def test_the_least_room_for_recall_is_a_span() -> None:
    assert MIN_PAGE_TOKENS == SPAN_TOKENS
    with pytest.raises(InvalidPolicy, match="15 tokens hold no page: set it to 16 or more, or to 0"):
        POLICY.with_changes(recall_tokens=15)


def test_the_keys_that_are_compared_count_as_host_memory(new_session: NewSession) -> None:
    session = new_session()
    before = session.stats.originals_bytes
    session.search("what?")
    keys = session.stats.originals_bytes - before
    assert keys == index_bytes(originals_of(session)) > 0
    assert session.fork().stats.originals_bytes == session.stats.originals_bytes


@pytest.mark.model
def test_the_demo_model_finds_what_a_question_is_about(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    rng = random.Random(5)
    told = facts(rng, 4)
    policy = plain_policy(trigger_tokens=400, keep_ratio=0.1, originals="host", pinned="sinks")
    session = Memory(TransformersEngine(*demo), policy).session()
    for fact in told:
        session.append([{"role": "user", "content": hide(rng, [fact], 10)}, {"role": "assistant", "content": "I see."}])
    assert len(session.segments) > 1
    for fact in told[:2]:
        assert any(fact.code in span.text for span in session.search(fact.question, top=2))
