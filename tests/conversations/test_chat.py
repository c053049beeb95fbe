"""One chat completion: read in steps, generated in parts, and kept only when it is complete."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from inside import context_of
from torch import Tensor

from am_memory import Generation, Memory, MemoryPolicy, Piece, Sampling, Session
from am_memory.conversations.chat import HostWork, PromptProgress, answer_chat
from am_memory.conversations.chat_answer import ChatAnswer, Delta, Part, ToolCall
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.threads import Threads
from am_memory.conversations.tool_calls import InvalidCall, ToolFormat
from am_memory.conversations.tool_calls.formats import HERMES, JSON, LLAMA3, MISTRAL, MISTRAL_ARGS
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import CompactionFailed, InvalidInput
from am_memory.session import appending

POLICY = MemoryPolicy(trigger_tokens=400, keep_ratio=0.25, pinned=3, keep_recent=4, chunk_tokens=32)
QUESTION = {"role": "user", "content": "a question that takes more than one chunk of thirty-two tokens to read"}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["sea", "sky"]}}, "required": ["at"]},
    },
}


@pytest.fixture
def threads(engine: TransformersEngine) -> Threads:
    return Threads(Memory(engine, POLICY))


def request(**options: object) -> ChatRequest:
    return ChatRequest(**{"messages": [QUESTION], "max_tokens": 8, "sampling": Sampling(), **options})  # type: ignore[arg-type]


def deltas(answer: ChatAnswer) -> Iterator[Delta]:
    """Run the whole answer; the conversation is kept at the end."""
    for step in answer_chat(answer):
        if isinstance(step, HostWork):
            step.run()
        elif isinstance(step, Delta):
            yield step


def run(answer: ChatAnswer) -> list[Part]:
    return [part for delta in deltas(answer) for part in delta.parts]


def test_a_prompt_is_read_in_steps_of_a_chunk(threads: Threads) -> None:
    steps = answer_chat(ChatAnswer(threads, request()))
    read = list(itertools.takewhile(lambda step: isinstance(step, PromptProgress), steps))
    left = [step.left_tokens for step in read]
    assert left[0] == read[0].total_tokens - 1
    assert len(read) > 2
    assert all(before - after <= 33 for before, after in pairwise(left))  # 32, and the last token, which is not counted
    assert left[-1] == 0


def test_a_failed_compaction_in_reading_is_tried_again(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    read, failures = appending.read, iter([CompactionFailed("out of memory"), None])

    def failing(session: Session) -> int:
        if (error := next(failures, None)) is not None:
            raise error
        return read(session)

    monkeypatch.setattr(appending, "read", failing)
    with pytest.raises(CompactionFailed):
        run(ChatAnswer(threads, request()))
    failures = iter([CompactionFailed("out of memory"), None])
    answer = ChatAnswer(threads, request())
    assert [step for step in answer_chat(answer, max_retries=1) if isinstance(step, Delta)]
    assert answer.finish_reason == "length"


def test_several_answers_share_their_passes(threads: Threads, pass_sizes: list[int]) -> None:
    """Also where nobody else makes the steps; the conversation keeps the first answer."""
    sampling = Sampling(temperature=1.0, seed=3)
    alone = ChatAnswer(threads, request(sampling=sampling))
    run(alone)
    threads.delete("default")
    answer = ChatAnswer(threads, request(sampling=sampling, num_answers=3))
    found = [*deltas(answer)]
    assert {delta.index for delta in found} == {0, 1, 2}
    assert max(pass_sizes) == 3
    assert answer.content == alone.content
    assert len({each.content for each in (answer, *answer.others)}) == 3
    assert answer.usage.completion_tokens == sum(each.num_tokens for each in (answer, *answer.others))
    (branch,) = threads.all_branches()
    assert branch.session is answer.session


def test_a_failing_answer_ends_the_others_and_nothing_is_kept(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, choose = ChatAnswer(threads, request(num_answers=3)), Generation.choose

    def failing(generation: Generation, logits: Tensor) -> Piece:
        if generation.context is context_of(answer.others[0].session) and generation.num_tokens == 2:
            raise InvalidInput("boom")
        return choose(generation, logits)

    monkeypatch.setattr(Generation, "choose", failing)
    with pytest.raises(InvalidInput, match="boom"):
        run(answer)
    assert answer.next_steps == ()
    assert threads.all_branches() == []


def test_the_last_delta_says_why_the_answer_ended(threads: Threads) -> None:
    answer = ChatAnswer(threads, request())
    reasons = [delta.finish_reason for delta in deltas(answer)]
    assert reasons == [*[None] * 7, "length"]


def test_the_parts_are_the_message_that_is_kept(threads: Threads) -> None:
    answer = ChatAnswer(threads, request())
    parts = run(answer)
    assert answer.message == {"role": "assistant", "content": "".join(map(str, parts))}
    assert answer.finish_reason == "length"
    again = ChatAnswer(threads, request(messages=[QUESTION, answer.message, QUESTION]))
    run(again)
    assert again.usage.cached_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_an_answer_that_is_not_kept_leaves_nothing_behind(threads: Threads) -> None:
    for step in answer_chat(ChatAnswer(threads, request())):
        if isinstance(step, Delta) and step.finish_reason is not None:
            break
    assert threads.names() == []


def test_owners_share_nothing_of_the_same_conversation(threads: Threads) -> None:
    first = ChatAnswer(threads, request(owner="ada", thread="ada/1"))
    run(first)
    cached = []
    for owner in ("ada", "bob", ""):
        answer = ChatAnswer(threads, request(owner=owner, thread=f"{owner}/2"))
        run(answer)
        cached.append(answer.usage.cached_tokens)
    assert cached[0] > 0
    assert cached[1:] == [0, 0]


def test_a_forced_call_is_a_part_and_the_reason_to_finish(threads: Threads) -> None:
    answer = ChatAnswer(threads, request(tools=[TOOL], tool_choice="look", max_tokens=200))
    (call,) = run(answer)
    assert isinstance(call, ToolCall)
    assert call.arguments["at"] in ("sea", "sky")
    assert json.loads(call.arguments_json) == call.arguments
    assert answer.finish_reason == "tool_calls"
    assert answer.message["tool_calls"] == [call.as_message()]


def test_every_token_that_is_said_has_its_log_probability(threads: Threads) -> None:
    answer = ChatAnswer(threads, request(top_logprobs=2))
    found = [token for delta in deltas(answer) for token in delta.logprobs]
    said = answer.session.tokens[-answer.num_tokens :]
    assert [token.token_id for token in found] == list(said)
    assert all(token.top[0] == (token.token_id, token.logprob) for token in found)  # greedy: the likeliest
    assert all(len(token.top) == 2 for token in found)


def test_what_cannot_be_asked_for_is_refused_before_anything_is_read(threads: Threads) -> None:
    with pytest.raises(InvalidInput, match="'sub' is none of the tools: look"):
        ChatAnswer(threads, request(tools=[TOOL], tool_choice="sub"))
    with pytest.raises(InvalidInput, match="there are none"):
        ChatAnswer(threads, request(tool_choice="required"))
    with pytest.raises(InvalidInput, match="response_format"):
        ChatAnswer(threads, request(response_format={"type": "poem"}))


# Grammars, and the checks after them

HAIL = {
    "type": "function",
    "function": {
        "name": "hail",
        "strict": True,
        "parameters": {"type": "object", "properties": {"ship": {"enum": ["Vesper"]}}, "required": ["ship"]},
    },
}
ODD = {"type": "object", "properties": {"at": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}}}


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the model write a text, and then end its turn."""

    def script(text: str) -> None:
        tokens = itertools.chain(text.encode(), itertools.repeat(257))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    return script


@pytest.mark.parametrize("format", [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, JSON], ids=lambda format: format.name)
def test_the_beginning_of_a_call_that_was_cut_off_is_not_said_beside_whole_ones(
    threads: Threads, format: ToolFormat, say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fragment became text of the answer, and later calls repeated it as the model's own words."""
    monkeypatch.setattr("am_memory.conversations.answer_format.tool_format", lambda engine: format)
    one, two = (format.write([("hail", {"ship": "Vesper"})] * count) for count in (1, 2))
    for cut in (1, 4, 9, 22):
        for options in ({"tool_choice": "required", "parallel_calls": True}, {}):
            say(two)
            num_tokens = len(one.removesuffix(format.end)) + cut
            answer = ChatAnswer(
                threads, request(tools=[HAIL], max_tokens=num_tokens, text_of_invalid_calls=True, **options)
            )
            (call,) = run(answer)
            assert isinstance(call, ToolCall)
            assert (answer.content, answer.message["content"], answer.finish_reason) == ("", "", "tool_calls")


def test_a_strict_tool_is_told_as_any_other(threads: Threads) -> None:
    plain = {**HAIL, "function": {name: value for name, value in HAIL["function"].items() if name != "strict"}}
    for tool in (HAIL, plain):
        run(answer := ChatAnswer(threads, request(tools=[tool])))
    assert answer.usage.cached_tokens > 0


@pytest.mark.parametrize("is_strict", [True, False])
def test_a_free_call_follows_its_schema_where_the_tool_is_strict(
    threads: Threads, say: Callable[[str], None], is_strict: bool
) -> None:
    tool = {**HAIL, "function": {**HAIL["function"], "strict": is_strict}}
    say(HERMES.write([("hail", {"ship": "Titanic"})]))
    answer = ChatAnswer(threads, request(tools=[tool], max_tokens=200))
    if is_strict:
        with pytest.raises(InvalidInput, match="does not follow the grammar"):
            run(answer)
    else:
        (call,) = run(answer)
        assert isinstance(call, ToolCall)


def test_one_call_at_most_is_made_where_one_is_asked_for(threads: Threads, say: Callable[[str], None]) -> None:
    for parallel, count in ((None, 2), (True, 2), (False, 1)):
        two = HERMES.write([("hail", {"ship": "Vesper"})] * 2)
        say(two if count == 2 else HERMES.write([("hail", {"ship": "Vesper"})]))
        answer = ChatAnswer(threads, request(tools=[HAIL], max_tokens=200, parallel_calls=parallel))
        assert len([part for part in run(answer) if isinstance(part, ToolCall)]) == count


@pytest.mark.parametrize("is_strict", [True, False])
def test_arguments_are_checked_for_what_no_grammar_holds(
    threads: Threads, say: Callable[[str], None], is_strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tool = {"type": "function", "function": {"name": "mark", "parameters": ODD, "strict": is_strict}}
    for numbers, is_right in (([1, 2], True), ([1, 1], False)):
        say(HERMES.write([("mark", {"at": numbers})]))
        answer = ChatAnswer(threads, request(tools=[tool], tool_choice="mark", max_tokens=200))
        (part,) = run(answer)
        assert isinstance(part, ToolCall) is (is_right or not is_strict)
        assert (answer.schema_error is None) is is_right
    assert "the arguments of mark do not follow their schema: ['at']: [1,1] has non-unique" in str(answer.schema_error)
    assert str(answer.schema_error) in caplog.text
    if is_strict:
        assert part == InvalidCall(
            '{"name": "mark", "arguments": {"at": [1, 1]}}',
            "the arguments do not follow their schema: ['at']: [1,1] has non-unique elements",
        )


def test_an_answer_in_a_form_is_checked_for_what_no_grammar_holds(threads: Threads, say: Callable[[str], None]) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": ODD}}
    for numbers, is_right in (("[1, 2]", True), ("[1, 1]", False)):
        say(f'{{"at": {numbers}}}')
        run(answer := ChatAnswer(threads, request(response_format=form, max_tokens=200)))
        assert (answer.schema_error is None) is is_right
        assert answer.finish_reason == "stop"


def test_an_answer_that_was_cut_off_is_not_checked(threads: Threads, say: Callable[[str], None]) -> None:
    say('{"at": [1, 1')
    form = {"type": "json_schema", "json_schema": {"schema": ODD}}
    run(answer := ChatAnswer(threads, request(response_format=form, max_tokens=10)))
    assert (answer.schema_error, answer.finish_reason) == (None, "length")


def test_beside_a_form_a_tool_can_be_called(threads: Threads, say: Callable[[str], None]) -> None:
    """The whole answer had to be JSON, so an agent with a response format never called a tool."""
    form = {"type": "json_schema", "json_schema": {"schema": ODD}}
    say(HERMES.write([("look", {"at": "sea"})]))
    (call,) = run(ChatAnswer(threads, request(tools=[TOOL], response_format=form, max_tokens=200)))
    assert isinstance(call, ToolCall)
    say('{"at": [1, 2]}')
    assert (
        "".join(map(str, run(ChatAnswer(threads, request(tools=[TOOL], response_format=form, max_tokens=200)))))
        == '{"at": [1, 2]}'
    )
