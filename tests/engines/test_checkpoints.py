"""Checkpoints: models with sliding windows and recurrent states go back without reading everything again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from driven import some_tokens
from inside import context_of
from random_operations import POLICY, differences
from test_families import LINEAR, Family
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Memory, Sampling, Session
from am_memory.conversations.branch import Branch
from am_memory.engines.base import SessionCache
from am_memory.engines.transformers import TransformersEngine
from am_memory.kv_cache.layers import RecurrentState
from am_memory.session import checkpoints
from am_memory.session.appending import add, encode, read

TOKENS = some_tokens(120)
PARTS = (40, 44, 60)
GREEDY = Sampling(temperature=0.0)


class CountingEngine(TransformersEngine):
    """Counts the tokens that it reads."""

    num_read = 0

    def forward(self, cache: SessionCache, token_ids: Sequence[int], **how: Any) -> Any:
        self.num_read += len(token_ids)
        return super().forward(cache, token_ids, **how)


@pytest.fixture(params=["sliding windows", "recurrent states"])
def stubborn(
    request: pytest.FixtureRequest,
    new_sliding_model: Callable[[], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerBase,
) -> CountingEngine:
    """An engine whose caches cannot drop tokens."""
    model = new_sliding_model() if request.param == "sliding windows" else Family("Qwen3Next", LINEAR).build()
    return CountingEngine(model, byte_tokenizer)


def told(memory: Memory, end: int = PARTS[-1]) -> Session:
    """A session that was told the first `end` tokens in parts."""
    session = memory.session()
    for start, stop in pairwise([0, *(part for part in PARTS if part < end), end]):
        session.append(TOKENS[start:stop])
    return session


@pytest.mark.parametrize("num_tokens", PARTS[:-1])
def test_going_back_to_where_a_message_began_reads_nothing(stubborn: CountingEngine, num_tokens: int) -> None:
    memory = Memory(stubborn, POLICY)
    session, other = told(memory), told(memory, num_tokens)
    before = stubborn.num_read
    assert session.can_rewind(num_tokens)
    session.rewind(num_tokens)
    assert stubborn.num_read == before
    assert differences(context_of(session), context_of(other)) == []
    for each in (session, other):
        each.append(TOKENS[70:80])
    assert differences(context_of(session), context_of(other)) == []


def test_from_there_the_first_tokens_of_the_message_are_read_again(stubborn: CountingEngine) -> None:
    memory = Memory(stubborn, POLICY)
    session, other = told(memory), told(memory, 52)
    before = stubborn.num_read
    assert session.can_rewind(52)
    session.rewind(52)
    assert stubborn.num_read - before == 52 - 44
    assert differences(context_of(session), context_of(other)) == []


def test_before_all_checkpoints_everything_is_read_again(stubborn: CountingEngine) -> None:
    memory = Memory(stubborn, POLICY)
    session, other = told(memory), told(memory, 30)
    before = stubborn.num_read
    assert not session.can_rewind(30)
    session.rewind(30)
    assert stubborn.num_read - before == 29
    assert differences(context_of(session), context_of(other)) == []
    assert session.stats.checkpoints_bytes == 0


@pytest.mark.parametrize(
    "said", [[{"role": "user", "content": "Who keeps the bees?"}], TOKENS[:40]], ids=["chat", "text"]
)
def test_an_answer_is_generated_again_at_once(stubborn: CountingEngine, said: Any) -> None:
    session = Memory(stubborn, POLICY).session()
    session.append(said)
    asked = len(session.tokens)
    first = "".join(piece.text for piece in session.generate(12, GREEDY))
    before = stubborn.num_read
    session.rewind(asked)
    assert stubborn.num_read == before
    assert "".join(piece.text for piece in session.generate(12, GREEDY)) == first


def test_a_compaction_in_between_is_repeated_as_before(stubborn: CountingEngine) -> None:
    """A checkpoint from before it would forget it."""
    memory = Memory(stubborn, POLICY)
    session, other = told(memory), told(memory, 44)
    session.compact(0.5)
    assert session.stats.checkpoints_bytes == 0
    assert not session.can_rewind(44)
    session.rewind(44)
    assert differences(context_of(session), context_of(other)) == []
    session.append(TOKENS[44:50])
    session.compact(0.5)
    session.append(TOKENS[50:60])
    assert session.can_rewind(50)


def test_a_page_recalled_in_between_is_repeated(stubborn: CountingEngine) -> None:
    """From the checkpoint the tokens would be read without it."""
    memory = Memory(stubborn, POLICY.with_changes(originals="host"))
    session = told(memory)
    session.compact(0.5)
    session.append(TOKENS[60:70])
    session.recall(session.segments[0])
    session.append(TOKENS[70:80])
    assert session.can_rewind(70)
    session.append(TOKENS[80:90])
    middle = session.fork()
    session.rewind(75)
    context_of(middle).checkpoints = ()
    middle.rewind(75)
    assert differences(context_of(session), context_of(middle)) == []


def test_forks_and_failed_steps_keep_checkpoints(stubborn: CountingEngine) -> None:
    session = told(Memory(stubborn, POLICY))
    fork = session.fork()
    held = context_of(session).checkpoints
    with pytest.raises(RuntimeError), context_of(session).transaction():
        context_of(session).tokens.extend(TOKENS[60:70])
        context_of(session).read_all()
        assert context_of(session).checkpoints != held
        raise RuntimeError
    assert context_of(session).checkpoints == held
    session.rewind(44)
    assert fork.can_rewind(44)
    fork.rewind(44)
    assert differences(context_of(session), context_of(fork)) == []


def test_a_compaction_under_way_goes_on(stubborn: CountingEngine) -> None:
    """It was dropped if it had begun behind the checkpoint, and another one began later."""
    policy = POLICY.with_changes(trigger_tokens=62, ahead_tokens=9)
    session, other = told(Memory(stubborn, policy)), told(Memory(stubborn, policy), 56)
    began = [context_of(each).background_compaction for each in (session, other)]
    assert [each and each.at_tokens for each in began] == [53, 53]
    assert session.can_rewind(56)
    session.rewind(56)
    assert differences(context_of(session), context_of(other)) == []
    for each in (session, other):
        each.append(TOKENS[56:70])
    assert session.stats.num_compactions == 1
    assert differences(context_of(session), context_of(other)) == []


def test_what_fails_while_tokens_are_read_again_leaves_theirs(
    stubborn: CountingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their entries were written over."""
    session = told(Memory(stubborn, POLICY))
    before, forward = session.fork(), stubborn.forward

    def failing(cache: SessionCache, token_ids: Sequence[int], **how: Any) -> Any:
        forward(cache, [token_id + 1 for token_id in token_ids], **how)
        raise RuntimeError

    for layer in context_of(session).cache.compactable:
        layer.buffer = layer.buffer.grown(layer.length, 100)  # it is the session's own
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(stubborn, "forward", failing)
        session.rewind(52)
    assert differences(context_of(session), context_of(before)) == []


def test_a_checkpoint_keeps_no_more_than_it_says(stubborn: CountingEngine) -> None:
    session = told(Memory(stubborn, POLICY))
    tensors = [
        tensor
        for checkpoint in context_of(session).checkpoints
        for state in checkpoint.states
        for tensor in (state.tensors if isinstance(state, RecurrentState) else (state.keys, state.values))
    ]
    assert session.stats.checkpoints_bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_message_that_is_read_in_many_steps_has_one(stubborn: CountingEngine) -> None:
    """Each step kept one, and those of earlier messages, and of its own beginning, went."""
    session = told(Memory(stubborn, POLICY))
    add(session, encode(session, TOKENS[60:90]))
    while read(session, 2):
        pass
    assert [held.num_tokens + 1 for held in context_of(session).checkpoints] == [*PARTS]
    assert session.can_rewind(PARTS[-1])


def test_checkpoints_are_few(stubborn: CountingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Memory(stubborn, POLICY).session()
    for start in range(0, 100, 4):
        session.append(TOKENS[start : start + 4])
    assert len(context_of(session).checkpoints) == checkpoints.MAX_CHECKPOINTS
    assert session.can_rewind(96)
    held = session.stats.checkpoints_bytes
    monkeypatch.setattr(checkpoints, "MAX_BYTES", held // 2)
    session.append(TOKENS[100:104])
    assert 0 < session.stats.checkpoints_bytes <= held // 2
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 0)
    session.append(TOKENS[104:108])
    assert len(context_of(session).checkpoints) == checkpoints.LEAST_CHECKPOINTS


def test_a_kept_conversation_counts_them(stubborn: CountingEngine) -> None:
    """Many conversations of a hybrid would take far more memory than their limit."""
    session = told(Memory(stubborn, POLICY))
    stats = session.stats
    kept = Branch(session, "chat", ("key",), (len(session.tokens),))
    assert kept.kv_bytes == stats.kv_bytes + stats.checkpoints_bytes > stats.kv_bytes


def test_a_cache_that_can_drop_tokens_needs_none(engine: TransformersEngine) -> None:
    session = told(Memory(engine, POLICY))
    assert session.can_rewind(30)
    assert session.stats.checkpoints_bytes == 0
