"""A conversation from the outside: text, messages and tokens in; text, logits and sizes out; errors that change nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from inside import cache_of, context_of, history_of, layers_of, rebuild, state_of
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from am_memory import Experiments, Memory, MemoryPolicy, Sampling, Session
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import (
    BudgetTooSmall,
    CompactionFailed,
    InvalidInput,
    InvalidPolicy,
    PromptTooLong,
    SessionNotFound,
    StorageError,
    UnsupportedOperation,
)
from am_memory.kv_cache.slots import PINNED_RANK
from am_memory.session.appending import read

POLICY = MemoryPolicy(trigger_tokens=2000, keep_ratio=0.25, keep_recent=8, pinned="sinks", chunk_tokens=64)
SMALL = POLICY.model_copy(update={"trigger_tokens": 96})
TEXT = "The owl sat on the old oak and looked at the moon. "
SYSTEM = {"role": "system", "content": "You are an owl."}
USER = {"role": "user", "content": "What do you see? 🌕"}
TOLD = {"role": "assistant", "content": "The moon."}
EOS = 257


@pytest.fixture
def memory(engine: TransformersEngine) -> Memory:
    return Memory(engine, POLICY)


@pytest.fixture
def session(memory: Memory) -> Session:
    return memory.session("alice")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes | Sequence[int]], None]:
    """Says what the model will say next."""
    script: list[int] = []

    class Scripted:
        def __init__(self, sampling: Sampling) -> None: ...

        def choose(self, logits: Tensor, token_ids: Sequence[int]) -> int:
            assert logits.shape == (260,)
            return script.pop(0)

    monkeypatch.setattr("am_memory.session.generation.Sampler", Scripted)
    return script.extend


def say(session: Session, count: int = 100, sampling: Sampling | None = None) -> str:
    return "".join(piece.text for piece in session.generate(count, sampling))


def chars(session: Session) -> str:
    """The whole conversation as text: a token is a byte or a mark."""
    return session.engine.decode(session.tokens)


def state(session: Session) -> tuple[object, ...]:
    return session.tokens, session.messages, history_of(session), session.stats, state_of(session)


def stock_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]


# Text and tokens


def test_text_and_its_tokens_are_the_same(memory: Memory) -> None:
    by_text, by_ids = memory.session(), memory.session()
    assert by_text.append(TEXT) == len(TEXT)
    by_ids.append(memory.tokenize(TEXT))
    assert by_text.tokens == by_ids.tokens == tuple(TEXT.encode())
    assert torch.equal(by_text.logits("hoo"), by_ids.logits("hoo"))


def test_appending_in_pieces_is_appending_at_once(memory: Memory, stock_model: PreTrainedModel) -> None:
    session = memory.session()
    for piece in (TEXT[:1], TEXT[1:20], TEXT[20:]):
        session.append(piece)
    expected = stock_logits(stock_model, [*TEXT.encode(), *b"hoo"])[-4:-1]
    torch.testing.assert_close(session.logits("hoo"), expected, rtol=0, atol=1e-4)


def test_a_text_begins_as_the_tokenizer_begins_texts(
    byte_tokenizer: PreTrainedTokenizerBase, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = memory.engine.encode
    monkeypatch.setattr(memory.engine, "encode", lambda text, add_special=False: [256] * add_special + encode(text))
    session = memory.session()
    session.append("ab")
    session.append("cd")
    assert session.tokens == (256, *b"abcd")


def test_a_session_of_plain_text_has_no_messages(session: Session) -> None:
    session.append(TEXT)
    say(session, 3)
    assert session.messages == []


# Logits


def test_row_i_predicts_token_i(session: Session, stock_model: PreTrainedModel) -> None:
    session.append(TEXT)
    continuation = b"and what it saw"
    logits = session.logits(list(continuation))
    assert logits.shape == (len(continuation), 260)
    assert logits.dtype == torch.float32
    expected = stock_logits(stock_model, [*TEXT.encode(), *continuation])[len(TEXT) - 1 : -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_logits_leave_the_session_as_it_was(session: Session) -> None:
    session.append(TEXT * 3)
    session.compact()
    before = state(session)
    session.logits("a" * 100)
    assert state(session) == before


# Generation


def test_greedy_generation_is_that_of_generate(session: Session, stock_model: PreTrainedModel) -> None:
    session.append(TEXT)
    tokens = [token for piece in session.generate(40) for token in piece.token_ids]
    expected = stock_model.generate(torch.tensor([list(TEXT.encode())]), max_new_tokens=40, do_sample=False)
    assert tokens == expected[0, len(TEXT) :].tolist()[: len(tokens)]
    assert session.tokens == (*TEXT.encode(), *tokens)


def test_the_last_piece_says_why_it_is_the_last(session: Session, scripted: Callable) -> None:
    session.append(TEXT)
    for script, count, stop, reason in (
        (b"abc", 3, (), "length"),
        ([*b"abc", EOS], 10, (), "eos"),
        (b"abc. ", 10, (". ",), "stop"),
        ([*b"ab", EOS], 3, (), "eos"),
    ):
        scripted(script)
        *pieces, last = session.generate(count, Sampling(stop=stop))
        assert {piece.finish_reason for piece in pieces} == {None}
        assert last.finish_reason == reason


def test_a_stop_text_is_not_given_out_but_is_in_the_conversation(session: Session, scripted: Callable) -> None:
    session.append("Q: who?\nA:")
    scripted(b" owl.\nQ: x")
    assert say(session, 20, Sampling(stop=("\nQ:",))) == " owl."
    assert chars(session) == "Q: who?\nA: owl.\nQ:"


def test_a_character_is_streamed_whole(session: Session, scripted: Callable) -> None:
    session.append(TEXT)
    scripted("a👍".encode())
    assert [piece.text for piece in session.generate(5)] == ["a", "", "", "", "👍"]


def test_who_stops_to_listen_keeps_what_was_given_out(session: Session) -> None:
    session.append(TEXT)
    pieces = session.generate(20)
    tokens = [token for _ in range(4) for token in next(pieces).token_ids]
    pieces.close()
    assert session.tokens == (*TEXT.encode(), *tokens)
    session.append("and on")


def test_a_seed_repeats_a_generation(memory: Memory) -> None:
    session = memory.session()
    session.append(TEXT)
    said = [say(session.fork(), 15, Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_the_memory_says_how_to_sample_where_a_call_does_not(engine: TransformersEngine) -> None:
    memory = Memory(engine, POLICY, sampling=Sampling(temperature=1.0, seed=3))
    session = memory.session()
    session.append(TEXT)
    assert say(session.fork(), 15) == say(session.fork(), 15, Sampling(temperature=1.0, seed=3))
    assert say(session.fork(), 15) != say(session.fork(), 15, Sampling())


def test_a_generation_goes_on_after_compactions(memory: Memory) -> None:
    session = memory.session(policy=SMALL)
    session.append(TEXT)
    say(session, 120)
    assert session.stats.num_compactions > 1
    assert session.stats.kv_tokens <= 96


# Chat


def rendered(session: Session, *messages: dict[str, str], answer: bool = False) -> str:
    return session.engine.render(messages, add_generation_prompt=answer)


def test_messages_are_the_words_of_the_template(session: Session) -> None:
    session.append([SYSTEM, USER])
    assert chars(session) == rendered(session, SYSTEM, USER)
    assert session.messages == [SYSTEM, USER]


@pytest.mark.parametrize("calls", [[[SYSTEM], [USER], [TOLD], [USER]], [[SYSTEM, USER], [TOLD, USER]]], ids=["1", "2"])
def test_messages_one_by_one_are_messages_at_once(session: Session, calls: list[list[dict[str, str]]]) -> None:
    num_added = [session.append(messages) for messages in calls]
    assert chars(session) == rendered(session, SYSTEM, USER, TOLD, USER)
    assert sum(num_added) == len(session.tokens)


def test_a_conversation_is_the_template_with_the_answers_spliced_in(session: Session, scripted: Callable) -> None:
    session.append([SYSTEM, USER])
    scripted([*b"A mouse.", EOS])
    assert say(session) == "A mouse."
    answer = {"role": "assistant", "content": "A mouse."}
    session.append([{"role": "user", "content": "And now?"}])
    scripted([*b"Gone.", EOS])
    say(session)
    told = [SYSTEM, USER, answer, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Gone."}]
    assert session.messages == told
    assert chars(session) + "\n" == rendered(session, *told)


def test_an_answer_cut_by_its_length_is_continued(session: Session, scripted: Callable) -> None:
    session.append([USER])
    scripted([*b"A mouse.", EOS])
    assert say(session, 3) == "A m"
    assert session.messages[-1] == {"role": "assistant", "content": "A m"}
    assert say(session) == "ouse."
    assert session.messages[-1] == {"role": "assistant", "content": "A mouse."}
    assert chars(session) + "\n" == rendered(session, USER, session.messages[-1])


def test_a_message_closes_an_answer_that_was_cut(session: Session, scripted: Callable) -> None:
    session.append([USER])
    scripted(b"A mo")
    say(session, 4)
    session.append([USER])
    assert chars(session) == rendered(session, USER, {"role": "assistant", "content": "A mo"}, USER)


def test_an_answer_ended_by_a_stop_text_stays_as_it_was_generated(session: Session, scripted: Callable) -> None:
    session.append([USER])
    scripted(b"A mouse. And")
    say(session, 20, Sampling(stop=(". ",)))
    session.append([USER])
    assert session.messages[1]["content"] == "A mouse"
    assert chars(session) == rendered(session, USER, {"role": "assistant", "content": "A mouse. "}, USER)


def test_a_complete_answer_waits_for_a_message(session: Session, scripted: Callable) -> None:
    session.append([USER])
    scripted([*b"Hoo.", EOS])
    say(session)
    before = state(session)
    with pytest.raises(InvalidInput, match="last answer is complete: append a message"):
        say(session)
    assert state(session) == before


def test_a_told_answer_is_followed_by_another_of_the_models_own(session: Session, scripted: Callable) -> None:
    session.append([USER, TOLD])
    scripted([*b"Hoo.", EOS])
    say(session)
    assert chars(session) == rendered(session, USER, TOLD, answer=True) + "Hoo.<|im_end|>"


def test_plain_text_after_messages_begins_the_answer_as_it_stands(session: Session, scripted: Callable) -> None:
    """Text that had opened the answer itself, and begun it, got the template's opening behind it all the same."""
    session.append([USER, TOLD])
    asked = "<|im_start|>user\nAnd where?<|im_end|>\n<|im_start|>assistant\nIn the "
    session.append(asked)
    scripted([*b"oak.", EOS])
    assert say(session) == "oak."
    assert chars(session) == rendered(session, USER, TOLD) + asked + "oak.<|im_end|>"
    told = asked.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert session.messages == [USER, TOLD, {"role": "assistant", "content": told + "oak."}]
    session.append([USER])
    assert chars(session) == rendered(session, USER, TOLD) + asked + "oak.<|im_end|>\n" + rendered(session, USER)


def test_plain_text_in_an_answer_puts_words_into_the_models_mouth(session: Session, scripted: Callable) -> None:
    session.append([USER])
    scripted(b"I see")
    say(session, 5)
    session.append(" a mouse, ")
    session.append(list(b"and "))
    scripted([*b"it me.", EOS])
    say(session)
    assert session.messages[-1]["content"] == "I see a mouse, and it me."


def test_plain_text_may_come_before_the_messages(session: Session) -> None:
    session.append(TEXT)
    session.append([USER])
    assert chars(session) == TEXT + rendered(session, USER)
    assert session.messages == [USER]


TOOLS = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}<|im_start|>tools\n{% endif %}"
    "[{{ message['content'] }}]"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def template(byte_tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[[str], None]]:
    """Changes the chat template."""
    before = byte_tokenizer.chat_template
    yield lambda text: setattr(byte_tokenizer, "chat_template", text)
    byte_tokenizer.chat_template = before


def test_messages_that_the_template_writes_as_one_turn_come_in_one_call(session: Session, template: Callable) -> None:
    template(TOOLS)
    results = [{"role": "tool", "content": name} for name in ("one", "two")]
    session.append([USER, *results])
    assert chars(session) == rendered(session, USER, *results)
    before = state(session)
    with pytest.raises(InvalidInput, match="rewrites the 3 messages before when 1 are added; append .* in one call"):
        session.append([{"role": "tool", "content": "three"}])
    assert state(session) == before


def test_what_the_template_refuses_is_bad_input(session: Session, template: Callable) -> None:
    template(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ message['content'] + '.' }}{% endfor %}"
    )
    for messages in ([SYSTEM], [{"role": "user", "content": 5}]):
        with pytest.raises(InvalidInput, match="chat template of .* does not take messages of roles"):
            session.append(messages)
    assert session.tokens == ()


def test_a_model_without_a_chat_template_takes_no_messages(session: Session, template: Callable) -> None:
    template(None)
    with pytest.raises(InvalidInput, match="no chat template, so it takes no messages: append text or token ids"):
        session.append([USER])


def test_a_template_that_ends_a_turn_with_a_bare_mark_is_closed_once(
    session: Session, template: Callable, scripted: Callable
) -> None:
    template(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    session.append([USER])
    scripted([*b"Hoo.", EOS])
    say(session)
    session.append([USER])
    assert chars(session) == rendered(session, USER, {"role": "assistant", "content": "Hoo."}, USER)


# Going back in a chat


def chat(session: Session, scripted: Callable) -> list[tuple[object, ...]]:
    """A conversation with all that can happen in one; what it was after each step."""
    follow_up = {"role": "user", "content": "And?"}
    steps: list[Callable[[], object]] = [
        lambda: session.append([SYSTEM]),
        lambda: session.append([USER]),
        lambda: (scripted([*b"A mouse.", EOS]), say(session)),
        lambda: session.append([follow_up]),
        lambda: (scripted(b"It is"), say(session, 5)),
        lambda: (scripted(b" gone"), say(session, 5)),
        lambda: session.append([follow_up]),
        lambda: session.append([TOLD, follow_up]),
        lambda: session.append("<|im_start|>assistant\nHm, "),
        lambda: (scripted([*b"no.", EOS]), say(session)),
        lambda: session.append([follow_up]),
    ]
    seen = []
    for step in steps:
        step()
        seen.append((session.tokens, session.messages, history_of(session).is_answering))
    return seen


def test_rewinding_to_any_step_of_a_chat_gives_what_it_was(session: Session, scripted: Callable) -> None:
    """Rewinding to before a question forgot that the answer before it was not closed yet, so that what was asked
    instead followed without the end of the turn; and a cut answer kept the text that was cut."""
    for tokens, messages, is_answering in chat(session, scripted):
        branch = session.fork()
        branch.rewind(len(tokens))
        assert branch.tokens == tokens
        assert (branch.messages, history_of(branch).is_answering) == (messages, is_answering)


def test_a_chat_goes_on_from_where_it_was_rewound_to(session: Session, scripted: Callable) -> None:
    for tokens, messages, _ in chat(session, scripted):
        branch, question = session.fork(), {"role": "user", "content": "Why?"}
        branch.rewind(len(tokens))
        branch.append([question])
        if b"Hm" not in bytes(token for token in tokens if token < 256):  # which the template would write otherwise
            assert chars(branch) == rendered(branch, *messages, question)


@pytest.mark.parametrize(
    ("num_chars", "left"), [(3, "A mouse ☃ it"), (6, "A mouse ☃"), (7, "A mouse "), (10, "A mouse")]
)
def test_an_answer_is_cut_where_it_is_rewound_to(
    session: Session, scripted: Callable, num_chars: int, left: str
) -> None:
    """Seven bytes before the end is in the middle of the snowman."""
    session.append([USER])
    scripted([*"A mouse ☃ it is".encode()])
    say(session, 17)
    session.rewind(len(session.tokens) - num_chars)
    assert session.messages == [USER, {"role": "assistant", "content": left}]
    scripted([*b"!", EOS])
    say(session)
    assert session.messages[-1]["content"] in (left + "!", "A mouse \ufffd!")


def test_a_told_message_is_cut_where_it_is_rewound_to(session: Session) -> None:
    session.append([SYSTEM, USER])
    left = rendered(session, SYSTEM) + "<|im_start|>user\nWhat do"
    session.rewind(len(session.engine.encode(left)))
    assert session.messages == [SYSTEM, {"role": "user", "content": "What do"}]
    session.append([USER])
    assert chars(session) == rendered(session, *session.messages)


def test_rewinding_to_nothing_is_beginning_anew(memory: Memory, scripted: Callable) -> None:
    session, fresh = memory.session(policy=SMALL), memory.session(policy=SMALL)
    session.append([SYSTEM, {"role": "user", "content": TEXT * 4}])
    session.rewind(0)
    assert (session.tokens, session.messages, session.stats.num_compactions) == ((), [], 0)
    for each in (session, fresh):
        each.append([USER])
    assert session.tokens == fresh.tokens
    assert session.stats == fresh.stats


@pytest.mark.parametrize("num_tokens", [-1, 52, 10**9])
def test_rewinding_to_where_nothing_is_is_refused(session: Session, num_tokens: int) -> None:
    session.append(TEXT)
    before = state(session)
    with pytest.raises(
        InvalidInput, match=rf"cannot rewind to {num_tokens} tokens: the session has 51; give a whole number"
    ):
        session.rewind(num_tokens)
    assert state(session) == before


# What stays exact


@pytest.mark.parametrize(
    ("pinned", "num_pinned"),
    [
        ("sinks", 4),
        (7, 7),
        (0, 0),
        ("system", len("?system\nYou are an owl.?\n?user\n")),
        ("first_message", len("?system\nYou are an owl.?\n?user\nWhat do you see? 1234?\n?assistant\n")),
    ],
)
def test_what_is_pinned_stays_exact_to_the_bit(memory: Memory, pinned: str | int, num_pinned: int) -> None:
    session = memory.session(policy=POLICY.model_copy(update={"trigger_tokens": 200, "pinned": pinned}))
    session.append([SYSTEM, USER, TOLD])
    cache = cache_of(session)
    exact = [[entry.clone() for entry in layer.exact_entries(0, num_pinned)] for layer in cache.compactable]
    for _ in range(4):
        session.append([{"role": "user", "content": TEXT}, TOLD])
    assert session.stats.num_compactions > 1
    assert cache.num_pinned_slots == num_pinned
    for layer, (key, value) in zip(cache.compactable, exact, strict=True):
        for head in range(layer.num_heads):
            kept = layer.slots.head(head)
            kept = kept.where(kept.ranks == PINNED_RANK)
            assert torch.equal(kept.key, key[head])
            assert torch.equal(kept.value, value[head])


def test_without_a_system_prompt_the_sinks_are_pinned(memory: Memory) -> None:
    session = memory.session(policy=SMALL.model_copy(update={"pinned": "system"}))
    session.append([USER, {"role": "assistant", "content": TEXT * 3}])
    assert cache_of(session).num_pinned_slots == 4


def test_text_before_a_pinned_system_prompt_is_pinned_with_it(memory: Memory) -> None:
    """The prompt's length was counted from the beginning of the context, so its end was not pinned."""
    session = memory.session(policy=POLICY.model_copy(update={"pinned": "system"}))
    session.append("12345")
    session.append([SYSTEM, USER])
    assert context_of(session).num_pinned == 5 + len("?system\nYou are an owl.?\n?user\n")


def test_a_system_prompt_that_leaves_no_room_is_refused(memory: Memory) -> None:
    session = memory.session(policy=SMALL.model_copy(update={"pinned": "system", "originals": "drop"}))
    with pytest.raises(
        PromptTooLong, match=r"the first 118 tokens are to stay exact .*: raise trigger_tokens from 96, or"
    ):
        session.append([{"role": "system", "content": TEXT * 2}, USER])
    assert (session.tokens, session.messages, context_of(session).num_pinned) == ((), [], 4)
    session.append([SYSTEM, USER])


def test_pinned_tokens_that_leave_no_room_are_refused_at_once(engine: TransformersEngine) -> None:
    with pytest.raises(InvalidPolicy, match="3000 tokens are pinned"):
        Memory(engine, POLICY.model_copy(update={"pinned": 3000}))


def test_few_pinned_tokens_may_have_a_tiny_trigger(engine: TransformersEngine) -> None:
    """The sinks were counted until the first append, also where the policy pins nothing."""
    policy = MemoryPolicy(
        trigger_tokens=8, pinned=0, keep_recent=2, keep_ratio=0.5, max_compact_tokens=2, recall_tokens=0
    )
    session = Memory(engine, policy).session()
    session.append(TEXT)
    assert session.stats.kv_tokens <= 8


# Compacting


def test_a_compaction_by_hand_reports_what_it_did(session: Session) -> None:
    session.append(TEXT * 2)
    report = session.compact(0.5)
    assert (report.start, report.end) == (4, 4 + 49)  # half of what is in the cache behind the sinks, rounded up
    assert report.kv_tokens_after == session.stats.kv_tokens < report.kv_tokens_before == 101
    assert report.kv_bytes_after == session.stats.kv_bytes < report.kv_bytes_before
    assert session.stats.num_compactions == session.stats.num_segments == 1
    assert session.stats.logical_tokens == 102


def test_everything_but_the_pinned_tokens_can_be_compacted(session: Session) -> None:
    session.append(TEXT)
    session.compact(1.0)
    assert session.stats.exact_tokens == 4
    assert session.logits("hoo").isfinite().all()


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_fraction_out_of_range_is_refused(session: Session, fraction: float) -> None:
    session.append(TEXT)
    with pytest.raises(InvalidInput, match="fraction is .*: it must be a number above 0, and at most 1"):
        session.compact(fraction)


def test_nothing_to_compact_is_said(session: Session) -> None:
    with pytest.raises(CompactionFailed, match="nothing to compact"):
        session.compact()
    session.append("abc")
    with pytest.raises(CompactionFailed, match="nothing to compact"):
        session.compact(1.0)


def test_too_few_tokens_for_the_floor_are_refused(memory: Memory) -> None:
    session = memory.session(policy=POLICY.model_copy(update={"experiments": Experiments(min_slots=8)}))
    session.append("abcdefghijklmnop")
    before = state(session)
    with pytest.raises(BudgetTooSmall, match=r"keep_ratio 0.25 of \d+ tokens .* at least 8 .* raise keep_ratio to"):
        session.compact(1.0)
    assert state(session) == before


# Branches


def test_a_branch_goes_its_own_way(memory: Memory) -> None:
    session = memory.session("alice")
    session.append([USER])
    branch = session.fork("bob")
    branch.append([TOLD])
    assert (session.messages, branch.messages) == ([USER], [USER, TOLD])
    assert memory.session("bob") is branch
    assert memory.names() == ["alice", "bob"]


def test_a_scratch_branch_is_not_kept(memory: Memory) -> None:
    session = memory.session("alice")
    session.append(TEXT)
    assert session.fork().tokens == session.tokens
    assert memory.names() == ["alice"]


def test_a_branch_takes_no_name_that_is_taken(memory: Memory) -> None:
    session = memory.session("alice")
    memory.session("bob")
    for name in ("alice", "bob"):
        with pytest.raises(InvalidInput, match=f"there is a session '{name}' already: choose another name"):
            session.fork(name)


def test_a_branch_may_have_another_policy(memory: Memory) -> None:
    session = memory.session()
    session.append(TEXT * 4)
    branch = session.fork(policy=SMALL)
    branch.append(TEXT)
    assert branch.stats.kv_tokens <= 96
    assert session.stats.num_compactions == 0
    with pytest.raises(InvalidPolicy):
        session.fork(policy=POLICY.model_copy(update={"trigger_tokens": 5000}))


# Bad input


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty input '': append at least one token"),
        ([], r"empty input \[\]"),
        ((), r"empty input \(\)"),
        ([260], "token id 260 at position 0 is outside the vocabulary of 260"),
        ([1, 2, -1], "token id -1 at position 2"),
        ([1, USER], "mixed: append them one after the other"),
        ([1.5], 'message 0 is 1.5; give {"role"'),
        ([1, True], "True at position 1 is not a token id: give whole numbers, or text"),
        (["a"], "message 0 is 'a'"),
        ([{"content": "no role"}], "message 0 is"),
        ([{"role": 5, "content": "x"}], "message 0 is"),
        ({"role": "user", "content": "not in a list"}, "dict cannot be read: give text, or a list of"),
        (None, "NoneType cannot be read"),
        (5, "int cannot be read"),
        (torch.tensor([1, 2]), "Tensor cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_content_is_refused_and_changes_nothing(session: Session, content: object, words: str) -> None:
    session.append([USER])
    before = state(session)
    with pytest.raises(InvalidInput, match=words):
        session.append(content)
    assert state(session) == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda memory: Memory("demo"), r"engine is 'demo': load a model by Memory.from_pretrained\('demo'\)"),
        (lambda memory: Memory(memory.engine, {"ridge": 1}), "policy is {'ridge': 1}: give a MemoryPolicy"),
        (lambda memory: Memory(memory.engine, sampling=0.7), "sampling is 0.7: give a Sampling"),
        (lambda memory: memory.session(3), "name is 3: give a str"),
        (lambda memory: memory.session("alice", policy="omp"), "policy is 'omp': give a MemoryPolicy"),
        (lambda memory: memory.session("alice").generate(sampling={"temperature": 1}), "give a Sampling"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(
    memory: Memory, call: Callable[[Memory], object], words: str
) -> None:
    """Each was an AttributeError from some depth of the library."""
    memory.session("alice").append([USER])
    with pytest.raises(InvalidInput, match=words):
        call(memory)


@pytest.mark.parametrize("content", ["", [], [260], [-1], [True], [USER], ["a"], 5, None], ids=repr)
def test_a_bad_continuation_has_no_logits(session: Session, content: object) -> None:
    session.append(TEXT)
    before = state(session)
    with pytest.raises(InvalidInput):
        session.logits(content)
    assert state(session) == before


def test_an_empty_session_has_nothing_that_follows(session: Session) -> None:
    for call in (lambda: session.generate(5), lambda: session.logits("a")):
        with pytest.raises(InvalidInput, match="session 'alice' is empty: append something"):
            call()


@pytest.mark.parametrize("count", [0, -3])
def test_no_tokens_at_all_cannot_be_generated(session: Session, count: int) -> None:
    session.append(TEXT)
    with pytest.raises(InvalidInput, match=f"max_new_tokens is {count}: give a whole number, at least 1"):
        session.generate(count)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda session: session.generate(2.5), "max_new_tokens is 2.5: give a whole number, at least 1"),
        (lambda session: session.generate("9"), "max_new_tokens is '9'"),
        (lambda session: session.generate(True), "max_new_tokens is True"),
        (lambda session: session.generate(1, top_logprobs=-1), "top_logprobs is -1: give a whole number, at least 0"),
        (lambda session: session.generate(1, top_logprobs=1.0), "top_logprobs is 1.0"),
        (lambda session: read(session, 2.5), "max_tokens is 2.5: give a whole number, at least 0"),
        (lambda session: read(session, -1), "max_tokens is -1"),
        (lambda session: session.rewind(5.0), "cannot rewind to 5.0 tokens: .* give a whole number between 0 and that"),
        (lambda session: session.rewind("5"), "cannot rewind to '5' tokens"),
        (lambda session: session.recall([1, 3]), r"\[1, 3\] is not a span: give one of `segments`"),
        (lambda session: session.recall((1.0, 3)), r"\(1.0, 3\) is not a span"),
        (lambda session: session.recall((1, 2, 3)), r"\(1, 2, 3\) is not a span"),
        (lambda session: session.recall(None), "None is not a span"),
        (lambda session: session.compact("1"), "fraction is '1': it must be a number above 0, and at most 1"),
        (lambda session: session.compact(True), "fraction is True"),
        (lambda session: session.compact(float("nan")), "fraction is nan"),
        (lambda session: session.search(5), "5 is nothing to search for"),
        (lambda session: session.search("owl", 2.5), "top is 2.5: give a whole number, at least 1"),
    ],
)
def test_what_is_no_such_number_is_refused_by_its_value(
    session: Session, call: Callable[[Session], object], words: str
) -> None:
    session.append(TEXT)
    before = state(session)
    with pytest.raises(InvalidInput, match=words):
        call(session)
    assert state(session) == before


@pytest.mark.parametrize(
    "meddle",
    [
        lambda session: session.append("x"),
        lambda session: session.rewind(5),
        lambda session: (session.rewind(len(session.tokens) - 1), session.append("x")),
    ],
    ids=["append", "rewind", "both"],
)
def test_a_session_that_changed_while_it_generated_says_so(
    session: Session, meddle: Callable[[Session], object]
) -> None:
    """Only lengths were compared: who took tokens back and added as many was not found out."""
    session.append(TEXT)
    pieces = session.generate(10)
    for _ in range(3):
        next(pieces)
    meddle(session)
    before = state(session)
    with pytest.raises(UnsupportedOperation, match="session 'alice' changed while it was generating: .*fork"):
        next(pieces)
    assert state(session) == before


# Failures


class Boom(Exception):
    """Nothing that the library knows."""


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, MemoryError])
def test_a_failed_step_leaves_messages_and_tokens_as_they_were(
    memory: Memory, scripted: Callable, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """A generation that failed at its first token left the opening of an answer behind."""
    session = memory.session("alice")
    session.append([SYSTEM, USER])
    before, forward = state(session), session.engine.forward

    def failing(*args: object, **kwargs: object) -> Tensor:
        forward(*args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(session.engine, "forward", failing)
        for call in (lambda: session.append([TOLD]), lambda: say(session), lambda: session.logits("a")):
            with pytest.raises(error):
                call()
            assert state(session) == before
    scripted([*b"Hoo.", EOS])
    assert say(session) == "Hoo."
    assert chars(session) == rendered(session, SYSTEM, USER, answer=True) + "Hoo.<|im_end|>"


def test_a_generation_that_fails_midway_keeps_the_tokens_given_out(
    session: Session, scripted: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.append([USER])
    scripted([*b"Hoo.", EOS])
    pieces = session.generate()
    said = next(pieces).text + next(pieces).text
    before = state(session)
    with monkeypatch.context() as patch:
        patch.setattr(context_of(session), "next_logits", lambda **_: (_ for _ in ()).throw(Boom()))
        with pytest.raises(Boom):
            next(pieces)
    assert state(session) == before
    assert said + say(session) == "Hoo."
    assert session.messages[-1]["content"] == "Hoo."


# The memory


def test_a_session_is_found_again_by_its_name(memory: Memory) -> None:
    memory.session("alice").append(TEXT)
    assert len(memory.session("alice").tokens) == len(TEXT)
    assert memory.session("bob").tokens == ()


def test_a_session_without_a_name_is_new_whatever_the_others_are_called(memory: Memory) -> None:
    """The first of them was called session-1, and so was given back to whoever had called his own so."""
    memory.session("session-1").append(TEXT)
    one, other = memory.session(), memory.session()
    assert one.tokens == other.tokens == ()
    assert len({"session-1", one.name, other.name}) == 3


def test_a_deleted_session_is_gone(memory: Memory) -> None:
    memory.session("alice").append(TEXT)
    memory.delete("alice")
    assert memory.names() == []
    assert memory.session("alice").tokens == ()
    with pytest.raises(SessionNotFound, match="no session 'bob'; there are: alice"):
        memory.delete("bob")


def test_a_memory_without_a_store_cannot_save(session: Session) -> None:
    with pytest.raises(StorageError, match=r"no store: make it with Memory\(..., store="):
        session.save()


def test_sessions_of_several_threads_do_not_mix(memory: Memory) -> None:
    alone, together = (
        [memory.session(f"{kind} {number}", policy=SMALL) for number in range(2)] for kind in ("alone", "together")
    )
    for number, session in enumerate(alone):
        session.append(f"{number} {TEXT}")
        say(session, 60)
    for number, session in enumerate(together):
        session.append(f"{number} {TEXT}")
    threads = [threading.Thread(target=say, args=(session, 60)) for session in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [session.tokens for session in together] == [session.tokens for session in alone]


def test_the_statistics_are_those_of_the_cache(memory: Memory) -> None:
    session = memory.session(policy=SMALL)
    assert session.stats.kv_bytes == session.stats.kv_tokens == session.stats.logical_tokens == 0
    session.append(TEXT * 4)
    stats, cache = session.stats, cache_of(session)
    per_token = 2 * 16 * 4 * 6  # key and value of 16 float32, of 2 KV heads in 3 layers
    assert stats.exact_kv_bytes == per_token * (stats.logical_tokens - 1)
    assert stats.kv_bytes == sum(tensor.nbytes for layer in cache.layers for tensor in layer.tensors)
    assert stats.kv_tokens <= 96 < stats.logical_tokens == 4 * len(TEXT)
    assert 4 < stats.exact_tokens < stats.kv_tokens
    assert stats.num_compactions == stats.num_segments > 1


def test_compactions_are_logged(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    session = Memory(engine, MemoryPolicy(trigger_tokens=200, pinned=4, keep_recent=8)).session("alice")
    with caplog.at_level("INFO", "am_memory"):
        session.append([position % 200 for position in range(250)])
    assert any("'alice': tokens 4 to" in record.message for record in caplog.records)


def test_a_listener_hears_only_while_it_listens(engine: TransformersEngine) -> None:
    memory, heard = Memory(engine, MemoryPolicy(trigger_tokens=200, pinned=4, keep_recent=8)), []
    session = memory.session()
    with memory.listening(heard.append):
        session.append([position % 200 for position in range(250)])
    num_heard = len(heard)
    session.append([position % 200 for position in range(250)])
    assert len(heard) == num_heard > 0


def test_what_an_application_keeps_with_a_session_is_saved_with_it(engine: TransformersEngine, tmp_path: Path) -> None:
    policy = MemoryPolicy(trigger_tokens=200, pinned=4)
    session = Memory(engine, policy, store=tmp_path).session("alice")
    session.append("hello")
    session.metadata["owner"] = {"name": "Ada", "owls": 2}
    session.save()
    assert Memory(engine, policy, store=tmp_path).session("alice").metadata == {"owner": {"name": "Ada", "owls": 2}}


# What counts


TOOL_TURN = [
    {"role": "user", "content": "Look up the ships, and keep 4711 in mind."},
    {"role": "tool", "content": "There are forty ships in the harbour, and they have long names."},
    {"role": "user", "content": "Thank you."},
]


def test_the_tokens_of_a_tool_result_count_less(engine: TransformersEngine) -> None:
    session = Memory(engine, MemoryPolicy(trigger_tokens=600, tool_result_weight=0.25)).session()
    session.append(TOOL_TURN)
    weights = context_of(session).history.token_weights(0.25, 3, len(session.tokens))
    assert weights is not None
    light = [token for token, weight in zip(session.tokens[3:], weights, strict=True) if weight == 0.25]
    assert engine.decode(light) == f"<|im_start|>tool\n{TOOL_TURN[1]['content']}<|im_end|>\n"
    assert {*weights} == {1.0, 0.25}


@pytest.mark.model
@pytest.mark.parametrize(("budget", "most"), [("adaptive", 0.8), ("calibrated", 0.9)])
def test_a_tool_result_that_counts_less_gets_fewer_slots(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], budget: str, most: float
) -> None:
    """Fewer by less where a calibration has its say as well: a head that needs many slots keeps them."""
    shares = []
    for weight in (1.0, 0.05):
        policy = MemoryPolicy(
            trigger_tokens=600, keep_ratio=0.2, pinned="sinks", tool_result_weight=weight, head_budget=budget
        )
        session = Memory(TransformersEngine(*demo), policy).session()
        session.append(TOOL_TURN)
        session.compact(1.0)
        (start, end), *_ = history_of(session).tool_results
        positions = torch.cat([layer.slots.positions for layer in layers_of(session)])
        shares.append(float(((positions >= start) & (positions < end)).float().mean()))
    assert shares[1] < most * shares[0]


def test_a_rebuilt_session_weighs_tool_results_as_before(engine: TransformersEngine) -> None:
    policy = MemoryPolicy(trigger_tokens=600, keep_ratio=0.2, pinned="sinks", tool_result_weight=0.05)
    session = Memory(engine, policy).session()
    session.append(TOOL_TURN)
    session.compact(1.0)
    expected = session.logits("ships")
    rebuild(session)
    assert torch.equal(session.logits("ships"), expected)


def test_what_nobody_uses_any_more_is_freed_at_once(memory: Memory) -> None:
    """Python frees cycles when it comes to it: sessions held as much as ever was read, and not what was in use."""
    gc.collect()
    gc.disable()
    try:
        session = memory.session("alice", policy=SMALL)
        session.append(TEXT * 6)
        branch = session.fork("bob")
        branch.append(TEXT)
        caches = [weakref.ref(cache_of(each)) for each in (session, branch)]
        assert session.stats.num_compactions > 0
        del session, branch
        for name in ("alice", "bob"):
            memory.release(name)
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()
