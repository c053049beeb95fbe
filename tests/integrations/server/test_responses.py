"""`/v1/responses` with the official client: items, events, and conversations that go on from an earlier response."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from serving import NewServer

from am_memory.conversations.chat_answer import ChatAnswer, Delta

TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Add two digits.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
        "required": ["a", "b"],
    },
    "strict": True,
}


def ask(client: openai.OpenAI, input: Any, **options: Any) -> Any:
    return client.responses.create(model="tiny", input=input, **{"temperature": 0, "max_output_tokens": 6, **options})


@pytest.fixture
def saying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the model say a text and end its turn."""

    def say(text: str) -> None:
        tokens = itertools.chain(text.encode(), itertools.repeat(257))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    return say


def test_a_response_has_openais_form(client: openai.OpenAI) -> None:
    response = ask(client, "hello", instructions="be brief", metadata={"topic": "tea"})
    assert (response.object, response.model, response.status) == ("response", "tiny", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert response.output_text == message.content[0].text
    assert response.usage.output_tokens == 6
    assert response.usage.total_tokens == response.usage.input_tokens + 6
    assert (response.instructions, response.metadata) == ("be brief", {"topic": "tea"})


def test_the_answer_is_that_of_a_chat_completion(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the same question"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=6)
    assert ask(client, "the same question", instructions="be brief").output_text == chat.choices[0].message.content


def test_a_response_goes_on_from_the_one_before_it(client: openai.OpenAI) -> None:
    """Only what is new is sent, and only what is new is read. Any earlier response may be named: that is a branch."""
    first = ask(client, "this is a conversation that comes back")
    second = ask(client, "and?", previous_response_id=first.id)
    other = ask(client, "or?", previous_response_id=first.id)
    for later in (second, other):
        assert later.previous_response_id == first.id
        assert later.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    third = ask(client, "go on", previous_response_id=second.id)
    assert third.usage.input_tokens_details.cached_tokens == second.usage.total_tokens
    assert third.am_memory["conversation"] == first.am_memory["conversation"]


def test_output_items_can_be_sent_back_instead(client: openai.OpenAI) -> None:
    first = ask(client, [{"role": "user", "content": "the items come back"}])
    given: Any = [{"role": "user", "content": "the items come back"}, *first.output]
    second = ask(client, [*given, {"role": "user", "content": [{"type": "input_text", "text": "and?"}]}])
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens


def test_a_stream_has_the_events_of_the_whole_response(client: openai.OpenAI) -> None:
    whole = ask(client, "stream this")
    events = list(ask(client, "stream this", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text
    assert ask(client, "and?", previous_response_id=events[-1].response.id).status


def test_the_clients_own_stream_puts_the_response_together(client: openai.OpenAI, saying: Any) -> None:
    saying("Put together.")
    with client.responses.stream(model="tiny", input="stream this", max_output_tokens=60) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == "Put together."


def test_a_call_and_its_result(client: openai.OpenAI, saying: Any) -> None:
    """The result goes on from the call: nothing is read again."""
    saying('Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 3}}\n</tool_call>')
    first = ask(client, "what is 1 + 3?", tools=[TOOL], max_output_tokens=200)
    Response.model_validate(first.to_dict())
    message, call = first.output
    assert message.content[0].text == "Let me see."
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "add", {"a": 1, "b": 3})
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "4"}
    saying("It is 4.")
    second = ask(client, [result], previous_response_id=first.id, tools=[TOOL], max_output_tokens=20)
    assert second.output_text == "It is 4."
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens
    saying("It is 4.")
    question: Any = {"role": "user", "content": "what is 1 + 3?"}
    whole = ask(client, [question, *first.output, result], tools=[TOOL], max_output_tokens=20)
    assert whole.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens


def test_a_forced_call_streams(client: openai.OpenAI) -> None:
    choice = {"type": "function", "name": "add"}
    events = list(
        ask(
            client,
            "add",
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            stream=True,
            max_output_tokens=200,
        )
    )
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments)["a"] in (1, 2)
    assert events[-1].type == "response.completed"


def test_reasoning_is_an_item_of_its_own(client: openai.OpenAI, saying: Any) -> None:
    saying("<think>greet</think>\n\nHi!")
    events = list(ask(client, "reason, please", stream=True, max_output_tokens=99))
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_python(event.to_dict())  # the client itself checks nothing
    reasoning, message = events[-1].response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "greet")
    assert message.content[0].text == "Hi!"
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "greet"


def test_an_answer_follows_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"]}
    form: Any = {"format": {"type": "json_schema", "name": "size", "schema": schema, "strict": True}}
    assert json.loads(ask(client, "how large?", text=form, max_output_tokens=60).output_text)["size"]


def test_responses_are_shown_and_forgotten(client: openai.OpenAI) -> None:
    response = ask(client, "remember this")
    assert client.responses.retrieve(response.id).output_text == response.output_text
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as refused:
        ask(client, "and?", previous_response_id=response.id)
    assert refused.value.code == "previous_response_not_found"
    unstored = ask(client, "do not remember this", store=False)
    with pytest.raises(openai.BadRequestError, match="it was not stored"):
        ask(client, "and?", previous_response_id=unstored.id)


def test_responses_belong_to_their_key_and_go_with_their_conversation(new_server: NewServer) -> None:
    with new_server(api_keys=["one-one-one", "two-two-two"], max_responses=2) as server:
        one, two = server.client("one-one-one"), server.client("two-two-two")
        first = ask(one, "mine", extra_body={"conversation": "tea"})
        with pytest.raises(openai.BadRequestError, match="there is no response"):
            ask(two, "yours?", previous_response_id=first.id)
        with server.http("one-one-one") as http:
            assert http.delete("/v1/memory/sessions/tea").status_code == 200
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(first.id)
        kept = [ask(one, f"number {number}").id for number in range(3)]
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(kept[0])
        assert one.responses.retrieve(kept[1]).id == kept[1]


def test_a_response_is_not_kept_if_its_conversation_is_deleted_meanwhile(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It outlived its conversation, and `previous_response_id` brought the deleted messages back."""
    generate, begun, going_on = ChatAnswer.generate, Event(), Event()

    def hesitant(answer: ChatAnswer) -> Iterator[Delta]:
        begun.set()
        going_on.wait(60)
        yield from generate(answer)

    monkeypatch.setattr(ChatAnswer, "generate", hesitant)
    with new_server() as server, server.http() as http, ThreadPoolExecutor() as pool:
        client = server.client()
        asked = pool.submit(ask, client, "a secret", extra_body={"conversation": "tea"})
        assert begun.wait(60)
        http.delete("/v1/memory/sessions/tea")
        going_on.set()
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(asked.result().id)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "needs output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}]}, "takes text only"),
        ({"input": []}, "input"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "extra_body": {"chat_template_kwargs": {"x": "<|im_end|>"}}}, "^.*chat_template_kwargs.x"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "needs a schema"),
    ],
)
def test_what_is_not_here_is_refused_by_name(client: openai.OpenAI, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(openai.BadRequestError, match=problem):
        ask(client, **options)
