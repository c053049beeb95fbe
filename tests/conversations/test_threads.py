"""Whole conversations, call after call: which tokens are read again, which branch goes on, and what it answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from am_memory import Memory, MemoryPolicy, Piece, Sampling, Session
from am_memory.conversations.branch import Branch
from am_memory.conversations.prompts import message_key
from am_memory.conversations.threads import Threads
from am_memory.conversations.turn import ChatTurn
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput

ROOMY = MemoryPolicy(trigger_tokens=2000, pinned=3, keep_recent=4, chunk_tokens=64)
TIGHT = MemoryPolicy(trigger_tokens=96, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=64)
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}


@pytest.fixture
def threads(engine: TransformersEngine) -> Threads:
    return Threads(Memory(engine, ROOMY))


def user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def answer(turn: ChatTurn, num_tokens: int = 4) -> dict[str, object]:
    """Generate greedily, keep the conversation, and give the answer as a message."""
    message = {"role": "assistant", "content": "".join(piece.text for piece in generate(turn.session, num_tokens))}
    turn.keep(message)
    return message


def told(branch: Branch) -> list[dict[str, object]]:
    return branch.session.messages


def generate(session: Session, num_tokens: int = 4) -> list[Piece]:
    return list(session.generate(num_tokens, Sampling()))


def test_the_second_call_reads_only_what_is_new(threads: Threads) -> None:
    messages = [user("hello there")]
    messages.append(answer(threads.turn(messages)))
    num_known = len(threads.branches("default")[0].session.tokens)
    turn = threads.turn([*messages, user("and now?")])
    assert turn.num_cached_tokens == num_known
    assert turn.rebuilt is None


def test_a_call_that_is_not_kept_leaves_nothing_behind(threads: Threads) -> None:
    turn = threads.turn([user("hello")])
    next(iter(turn.session.generate(5)))
    assert threads.branches("default") == []
    assert threads.memory.names() == []


def test_an_extended_conversation_takes_the_place_of_its_beginning(threads: Threads) -> None:
    messages: list[dict[str, object]] = []
    for text in ("one", "two", "three"):
        messages.append(user(text))
        messages.append(answer(threads.turn(messages)))
    assert len(threads.branches("default")) == 1


def test_a_retry_starts_from_the_end_of_its_prompt(threads: Threads) -> None:
    messages = [user("hello there")]
    first = threads.turn(messages)
    num_prompt = len(first.session.tokens)
    answer(first)
    assert threads.turn(messages).num_cached_tokens == num_prompt


def test_two_branches_in_turn_both_find_what_they_said(threads: Threads) -> None:
    shared = [user("tell me")]
    shared.append(answer(threads.turn(shared)))
    branches = [[*shared, user("left")], [*shared, user("right")]]
    for messages in branches:
        messages.append(answer(threads.turn(messages)))
    for messages in branches:
        known = next(branch.session.tokens for branch in threads.branches("default") if messages[2] in told(branch))
        turn = threads.turn([*messages, user("go on")])
        assert turn.num_cached_tokens == len(known)
        assert turn.session.tokens[: len(known)] == known
        answer(turn)


def test_an_edited_message_is_read_from_the_edit_on(threads: Threads) -> None:
    messages = [user("first"), {"role": "assistant", "content": "ok"}, user("second")]
    answer(threads.turn(messages))
    edited = threads.turn([*messages[:2], user("other")])
    assert edited.session.messages == [*messages[:2], user("other")]
    assert 0 < edited.num_cached_tokens < len(edited.session.tokens)


def test_other_tools_begin_another_conversation(threads: Threads) -> None:
    messages = [user("hello")]
    messages.append(answer(threads.turn(messages)))
    turn = threads.turn([*messages, user("more")], [TOOL])
    assert turn.num_cached_tokens == 0


def test_a_second_result_of_tools_is_told_where_the_template_writes_both_as_one_message(threads: Threads) -> None:
    """A branch was cut after the first result. The template writes both as one message, so the second was lost."""
    calls = [{"id": id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for id in ("1", "2")]
    messages = [user("look twice"), {"role": "assistant", "content": "", "tool_calls": calls}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "an owl"})
    answer(threads.turn(messages))
    turn = threads.turn([*messages, {"role": "tool", "tool_call_id": "2", "content": "a mouse"}])
    told = turn.session.messages[-1]["content"]
    assert told == "<tool_response>\nan owl\n</tool_response>\n<tool_response>\na mouse\n</tool_response>"
    assert "a mouse" in threads.memory.engine.decode(turn.session.tokens)
    assert turn.num_cached_tokens > 0


def test_threads_share_what_they_begin_with(threads: Threads) -> None:
    system = {"role": "system", "content": "You are an owl. " * 5}
    answer(threads.turn([system, user("one")], thread="a"))
    assert threads.turn([system, user("two")], thread="b").num_cached_tokens > 0


def test_the_branch_before_a_compaction_is_kept_to_go_back_to(engine: TransformersEngine) -> None:
    threads = Threads(Memory(engine, TIGHT))
    messages = [user("a" * 30)]
    messages.append(answer(threads.turn(messages)))
    before = threads.branches("default")[0].session
    assert before.stats.num_compactions == 0
    longer = [*messages, user("b" * 60)]
    answer(threads.turn(longer))
    assert [branch.session.stats.num_compactions > 0 for branch in threads.branches("default")] == [False, True]
    again = threads.turn([*messages, user("c")])
    assert again.num_cached_tokens == len(before.tokens)
    assert again.rebuilt is None


def test_leaving_a_conversation_inside_a_compacted_span_reads_again_and_says_why(engine: TransformersEngine) -> None:
    threads = Threads(Memory(engine, TIGHT))
    messages = [user("a" * 30), {"role": "assistant", "content": "b" * 30}, user("c" * 60)]
    answer(threads.turn(messages))
    turn = threads.turn([*messages[:2], user("other")])
    assert turn.num_cached_tokens == 0
    assert turn.rebuilt is not None
    assert "after message 2 of 3" in turn.rebuilt


def test_a_thread_survives_its_process(engine: TransformersEngine, tmp_path: Path) -> None:
    messages = [user("hello there")]
    messages.append(answer(Threads(Memory(engine, ROOMY, store=tmp_path)).turn(messages, thread="t/1")))
    after_restart = Threads(Memory(engine, ROOMY, store=tmp_path))
    turn = after_restart.turn([*messages, user("still there?")], thread="t/1")
    assert turn.num_cached_tokens > 0
    assert after_restart.names() == ["t/1"]


def test_a_deleted_thread_is_gone_from_memory_and_store(engine: TransformersEngine, tmp_path: Path) -> None:
    threads = Threads(Memory(engine, ROOMY, store=tmp_path))
    for thread in ("a", "ab"):
        answer(threads.turn([user(thread)], thread=thread))
    threads.delete("a")
    assert threads.names() == ["ab"]
    assert Threads(Memory(engine, ROOMY, store=tmp_path)).turn([user("a")], thread="a").num_cached_tokens == 0


def test_a_copied_thread_goes_its_own_way(threads: Threads) -> None:
    messages = [user("hello")]
    messages.append(answer(threads.turn(messages, thread="a")))
    threads.copy("a", "b")
    threads.delete("a")
    assert threads.turn([*messages, user("on")], thread="b").num_cached_tokens > 0


def test_copying_an_unknown_thread_says_which_there_are(threads: Threads) -> None:
    answer(threads.turn([user("hello")], thread="mine"))
    with pytest.raises(InvalidInput, match="no thread 'yours'.*mine"):
        threads.copy("yours", "b")


def test_caches_beyond_the_limit_go_oldest_first_and_come_back_from_the_store(
    engine: TransformersEngine, tmp_path: Path
) -> None:
    threads = Threads(Memory(engine, ROOMY, store=tmp_path), max_bytes=1)
    said = {}
    for thread in ("a", "b"):
        messages = [user(f"hello from {thread}")]
        said[thread] = [*messages, answer(threads.turn(messages, thread=thread))]
    assert threads.branches("a") == []
    assert len(threads.branches("b")) == 1
    assert threads.turn([*said["a"], user("back")], thread="a").num_cached_tokens > 0


def test_the_same_answer_again_is_kept_once(threads: Threads) -> None:
    for _ in range(3):
        answer(threads.turn([user("hello")]))
    assert len(threads.branches("default")) == 1


def test_no_more_branches_are_kept_than_allowed(engine: TransformersEngine) -> None:
    threads = Threads(Memory(engine, ROOMY), max_branches=2)
    for number in range(4):
        answer(threads.turn([user(f"hello {number}")]))
    assert [told(branch)[0]["content"] for branch in threads.branches("default")] == ["hello 2", "hello 3"]
    assert len(threads.memory.names()) == 2


def test_what_a_longer_branch_went_on_from_goes_before_any_other(engine: TransformersEngine) -> None:
    """The branch of a waiting conversation matters more than one that another conversation has extended."""
    threads = Threads(Memory(engine, TIGHT), max_branches=3)
    waiting = [user("I wait.")]
    waiting.append(answer(threads.turn(waiting)))
    messages: list[dict[str, object]] = []
    while len(threads.branches("default")) < 3:  # the branch before a compaction stays
        messages.append(user("some words more than before"))
        messages.append(answer(threads.turn(messages)))
    answer(threads.turn([user("a third one")]))
    assert len(threads.branches("default")) == 3
    conversations = [told(branch) for branch in threads.branches("default")]
    assert waiting in conversations
    assert messages in conversations


def test_pruning_keeps_the_branches_used_last(threads: Threads) -> None:
    for number in range(3):
        answer(threads.turn([user(f"hello {number}")]))
    assert threads.prune("default", keep=1) == 2
    assert [told(branch)[0]["content"] for branch in threads.branches("default")] == ["hello 2"]
    assert threads.prune("default", keep=0) == 1
    assert threads.names() == []


def test_after_a_restart_every_branch_is_found(engine: TransformersEngine, tmp_path: Path) -> None:
    before = Threads(Memory(engine, ROOMY, store=tmp_path))
    branches = []
    for text in ("left", "right"):
        messages = [user("tell me"), {"role": "assistant", "content": "what?"}, user(text)]
        branches.append([*messages, answer(before.turn(messages))])
    after = Threads(Memory(engine, ROOMY, store=tmp_path))
    for messages in branches:
        turn = after.turn([*messages, user("on")])
        assert len(turn.session.tokens) - turn.num_cached_tokens < 40


def test_a_stored_branch_of_another_model_is_passed_over(
    engine: TransformersEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(Threads(Memory(engine, ROOMY, store=tmp_path)).turn([user("hello")]))
    monkeypatch.setattr(engine, "info", replace(engine.info, fingerprint="another"))
    turn = Threads(Memory(engine, ROOMY, store=tmp_path)).turn([user("hello")])
    assert turn.num_cached_tokens == 0
    assert "was saved with model" in caplog.text


def test_a_policy_of_its_own_is_kept_on_later_calls(engine: TransformersEngine, tmp_path: Path) -> None:
    messages = [user("a" * 30)]
    threads = Threads(Memory(engine, ROOMY, store=tmp_path))
    turn = threads.turn(messages, policy=TIGHT)
    messages = [*messages, answer(turn), user("b" * 80)]
    for each in (threads, Threads(Memory(engine, ROOMY, store=tmp_path))):
        turn = each.turn(messages, policy=TIGHT)
        assert turn.num_cached_tokens > 0
        assert turn.session.stats.kv_tokens <= TIGHT.trigger_tokens


@pytest.mark.parametrize("limit", ["max_bytes", "max_branches"])
def test_a_limit_below_one_is_refused(engine: TransformersEngine, limit: str) -> None:
    with pytest.raises(InvalidInput, match=f"{limit} is 0"):
        Threads(Memory(engine, ROOMY), **{limit: 0})


def test_no_messages_are_refused(threads: Threads) -> None:
    with pytest.raises(InvalidInput, match="no messages"):
        threads.turn([])


def test_a_key_ignores_the_ids_of_calls_and_the_form_of_their_arguments() -> None:
    def call(call_id: str, arguments: object) -> dict[str, object]:
        function = {"name": "look", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"id": call_id, "function": function}]}

    assert message_key(call("1", '{"a": 1,  "b": 2}')) == message_key(call("2", {"b": 2, "a": 1}))
    assert message_key(call("1", {"a": 1})) != message_key(call("1", {"a": 2}))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["say", "retry", "edit", "drop", "abandon"]), st.integers(0, 5), st.text("abc ", max_size=30)
    ),
    min_size=2,
    max_size=7,
)


@pytest.mark.parametrize("policy", [ROOMY, TIGHT], ids=["nothing compacted", "compacted"])
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_history_of_calls_gives_what_reading_it_afresh_gives(
    engine: TransformersEngine, policy: MemoryPolicy, steps: list[tuple[str, int, str]]
) -> None:
    """New messages, retries, edits, cuts and abandoned answers, compared with a session that reads the same tokens."""
    threads = Threads(Memory(engine, policy))
    messages = [user("begin")]
    for kind, index, text in steps:
        match kind:
            case "say":
                messages = [*messages, user(f"say {text}")]
            case "edit":
                messages = [*messages[: 2 * (index % ((len(messages) + 1) // 2))], user(f"edit {text}")]
            case "drop" if len(messages) > 2:
                messages = messages[: 2 * (index % (len(messages) // 2)) + 1]
            case _:
                messages = messages[: len(messages) - (messages[-1]["role"] == "assistant")]
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        turn = threads.turn(messages)
        if kind == "abandon":
            next(iter(turn.session.generate(3, Sampling())))
            continue
        pieces = generate(turn.session)
        afresh = threads.memory.scratch()
        afresh.append(list(turn.session.tokens[: -len(pieces)]))
        assert [piece.token_ids for piece in generate(afresh)] == [piece.token_ids for piece in pieces]
        said = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        turn.keep(said)
        messages = [*messages, said]
