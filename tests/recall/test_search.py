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
from policies import plain_policy
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, Sampling, Session
from am_memory.cli.letters import facts, hide
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.recall import search
from am_memory.recall.search import PASSAGE_TOKENS, span_scores
from am_memory.recall.search_heads import SPAN_TOKENS, lift, search_heads
from am_memory.recall.search_queries import read_on_scratch

POLICY = plain_policy(
    trigger_tokens=128,
    keep_ratio=0.25,
    keep_recent=8,
    pinned=3,
    chunk_tokens=32,
    originals="host",
    recall_tokens=0,
    head_budget="adaptive",
)

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


@pytest.mark.parametrize(
    "changes", [{}, {"originals": "drop"}, {"window": 160, "trigger_tokens": 64}], ids=["originals", "slots", "moved"]
)
def test_a_score_is_what_the_definition_gives(
    new_session: NewSession, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a softmax over every key, one search head at a time."""
    monkeypatch.setattr(search, "usual_distance", lambda distance: distance)
    session = new_session(**changes)
    if "window" in changes:
        assert session.segments[0].shift > 0
    context, cache, engine = context_of(session), cache_of(session), session.engine
    num_tokens, found = cache.num_tokens, search_heads(engine)
    asked = some_tokens(45, seed=9)
    text = read_on_scratch(engine, cache, found.heads, asked, 64).at(range(num_tokens, num_tokens + len(asked)))
    lifts = []
    for index, head in enumerate(found.heads):
        key, bias, positions = keys_by_position(session, head.layer, head.head)
        layer = cache.compactable[head.layer]
        usual = layer.rotated(found.usual[index][None], num_tokens - found.position)[0].float()
        spans = positions // SPAN_TOKENS, -(-num_tokens // SPAN_TOKENS)
        of_text = span_shares(text[index], key * layer.scaling, bias, *spans)
        passages = torch.split(of_text, PASSAGE_TOKENS)
        usually = span_shares(usual, key * layer.scaling, bias, *spans).mean(0)
        lifts.append(torch.stack([lift(passage.mean(0), usually) for passage in passages]))
    expected = torch.stack(lifts).mean(0).amax(0)
    scores = span_scores(engine, cache, context.originals, text, num_tokens)
    is_compact = scores > -torch.inf
    torch.testing.assert_close(scores[is_compact], expected[is_compact], rtol=1e-3, atol=1e-4)
    assert int(is_compact.sum()) == -(-session.segments[-1].end // SPAN_TOKENS)


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
