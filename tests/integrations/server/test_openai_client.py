"""The official `openai` client with the server: every option does what OpenAI's API says."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import openai
import pytest
from serving import POLICY, NewServer, Server

Message = dict[str, Any]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two digits.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
            "required": ["a", "b"],
        },
    },
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def ask(client: openai.OpenAI, messages: list[Message], **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **{"temperature": 0, **options})


def test_an_answer_has_openais_form(client: openai.OpenAI) -> None:
    completion = ask(client, [user("hello")], max_tokens=5)
    assert completion.object == "chat.completion"
    assert completion.model == "tiny"
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 5
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 5


def test_a_conversation_reads_only_its_new_messages(client: openai.OpenAI) -> None:
    messages = [user("this is a conversation that comes back")]
    first = ask(client, messages)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, user("and?")]
    second = ask(client, messages)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


@pytest.mark.parametrize("pinned", ["sinks", "system"])
def test_a_system_prompt_longer_than_the_trigger_must_not_be_pinned(new_server: NewServer, pinned: str) -> None:
    messages = [{"role": "system", "content": "this is a rather long system prompt " * 12}, user("hello")]
    with new_server(policy=POLICY.model_copy(update={"pinned": pinned})) as server:
        if pinned == "system":
            with pytest.raises(openai.BadRequestError, match="raise trigger_tokens from 300, or pin less"):
                ask(server.client(), messages)
        else:
            assert ask(server.client(), messages).usage.prompt_tokens > 300
            with server.http() as http:
                (session,) = http.get("/v1/memory/sessions").json()["data"]
            assert session["stats"]["kv_tokens"] <= 300


def test_the_whole_message_of_the_client_can_be_sent_back(client: openai.OpenAI) -> None:
    messages: list[Any] = [user("the whole message is sent back")]
    first = ask(client, messages)
    second = ask(client, [*messages, first.choices[0].message, user("and?")])
    assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    whole = ask(client, [user("stream this")], max_tokens=12)
    chunks = list(
        ask(client, [user("stream this")], max_tokens=12, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].choices == []


def test_a_stream_without_options_has_no_usage(client: openai.OpenAI) -> None:
    chunks = list(ask(client, [user("stream this")], stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_include_memory_adds_chunks_about_the_memory(client: openai.OpenAI) -> None:
    long = user("a prompt longer than the cache, which is compacted as it is read. " * 8)
    chunks = list(ask(client, [long], stream=True, stream_options={"include_memory": True}))
    told = [chunk.am_memory for chunk in chunks if not chunk.choices]
    assert {"reading", "compacting", "compacted", "size", "memory"} <= {item["event"] for item in told}
    last = told[-1]["memory"]
    assert last["stats"]["kv_tokens"] <= 300 < last["stats"]["logical_tokens"]
    assert [part["kind"] for part in last["segments"]][0] == "pinned"
    assert len(last["compactions"]) == last["stats"]["num_compactions"] >= 1


@pytest.mark.usefixtures("looking_back")
def test_a_stream_tells_what_was_looked_up_before_the_answer(client: openai.OpenAI) -> None:
    long = user("a prompt longer than the cache, which is compacted as it is read. " * 8)
    chunks = list(ask(client, [long], stream=True, stream_options={"include_memory": True}))
    told = [chunk.choices[0].delta.content or "" if chunk.choices else chunk.am_memory["event"] for chunk in chunks]
    assert told[1:].index("looked_up") < told[1:].index("size")
    (found,) = [chunk.am_memory for chunk in chunks if not chunk.choices and chunk.am_memory["event"] == "looked_up"]
    (span,) = found["spans"]
    assert span["text"] in f"<|im_start|>user\n{long['content']}"
    assert found["recalled"] == [{"start": span["start"], "end": span["end"]}]
    assert found["stats"]["recalled_tokens"] == 20
    last = [chunk.am_memory for chunk in chunks if not chunk.choices][-1]
    assert last["memory"]["recalled"] == found["recalled"]


def test_a_prompt_longer_than_the_window_is_compacted_as_it_is_read(client: openai.OpenAI) -> None:
    long = "many words, far more than the model's window of 4096 positions. " * 80
    completion = ask(client, [user(long)], max_tokens=3)
    assert completion.usage.prompt_tokens > 4096


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    answers = [
        ask(client, [user("dice")], temperature=1.5, seed=seed, max_tokens=16).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: openai.OpenAI) -> None:
    text = ask(client, [user("go on")], max_tokens=24).choices[0].message.content
    stop = text[5:7]
    stopped = ask(client, [user("go on")], max_tokens=24, stop=[stop, "never said"])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_come_with_each_token(client: openai.OpenAI) -> None:
    completion = ask(client, [user("hello")], max_tokens=6, logprobs=True, top_logprobs=3)
    tokens = completion.choices[0].logprobs.content
    assert len(tokens) == 6
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy: the likeliest was taken
        assert token.logprob <= 0


def test_log_probabilities_of_a_stream_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = ask(client, [user("hello")], max_tokens=6, logprobs=True)
    chunks = ask(client, [user("hello")], max_tokens=6, logprobs=True, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in whole.choices[0].logprobs.content]


def test_a_forced_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    options = {"tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    completion = ask(client, [user("add something")], tools=[TOOL], **options)
    (call,) = completion.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "add"
    assert arguments["a"] in (1, 2)
    assert arguments["b"] in (3, 4)
    assert completion.choices[0].finish_reason == "tool_calls"


def test_a_tool_result_continues_from_its_call(client: openai.OpenAI) -> None:
    messages: list[Any] = [user("add something, and say it")]
    options = {"tools": [TOOL], "max_tokens": 200}
    first = ask(client, messages, tool_choice="required", parallel_tool_calls=False, **options)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
    second = ask(client, [*messages, message, result], tool_choice="auto", **{**options, "max_tokens": 4})
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_tool_calls_stream_whole(client: openai.OpenAI) -> None:
    chunks = list(
        ask(client, [user("add something")], tools=[TOOL], tool_choice="required", max_tokens=400, stream=True)
    )
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert all(call.function.name == "add" and json.loads(call.function.arguments) for call in calls)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_follows_its_json_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"size": {"enum": ["small", "large"]}}, "required": ["size"]}
    form = {"type": "json_schema", "json_schema": {"name": "size", "schema": schema, "strict": True}}
    completion = ask(client, [user("how large?")], response_format=form, max_tokens=60)
    assert json.loads(completion.choices[0].message.content)["size"] in ("small", "large")


def test_json_mode_gives_an_object(client: openai.OpenAI) -> None:
    completion = ask(client, [user("json")], response_format={"type": "json_object"}, max_tokens=60)
    assert isinstance(json.loads(completion.choices[0].message.content), dict)


def test_the_model_is_listed_and_any_other_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 17}, "n"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"logit_bias": {"260": 1}}, "logit_bias names token 260: this model has tokens 0 to 259"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "'tokenize' cannot be set here"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, "'chat_template' cannot be set here"),
        ({"extra_body": {"chat_template_kwargs": {"unk_token": "x"}}}, "'unk_token' cannot be set here"),
        ({"extra_body": {"chat_template_kwargs": {"sanitize_control_tokens": True}}}, "'sanitize_control_tokens' can"),
        ({"extra_body": {"chat_template_kwargs": {"a": "<|im_end|>"}}}, "chat_template_kwargs.a"),
        ({"extra_body": {"continue_final_message": True}}, "let it be an assistant's"),
        ({"max_tokens": 10**6}, "limit of 16384"),
        ({"top_logprobs": 2}, "logprobs: true"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, "schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "sub"),
        ({"extra_body": {"metadata": {"conversation_id": "\n"}}}, "cannot name a conversation"),
    ],
)
def test_an_unsupported_option_is_refused_by_name(client: openai.OpenAI, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(openai.BadRequestError, match=problem):
        ask(client, [user("hello")], **options)


def test_images_are_refused(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    with pytest.raises(openai.BadRequestError, match="takes text only"):
        ask(client, [{"role": "user", "content": [image]}])


def test_text_parts_are_joined(client: openai.OpenAI) -> None:
    ask(client, [user("two parts")])
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    again = ask(client, [{"role": "user", "content": parts}])
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_plain_completions_continue_from_the_longest_cached_prefix(client: openai.OpenAI) -> None:
    prompt = "Once upon a time there was a server"
    first = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
    text = first.choices[0].text
    second = client.completions.create(model="tiny", prompt=prompt + text + " and", max_tokens=4, temperature=0)
    assert first.usage is not None
    assert first.usage.prompt_tokens == len(prompt)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == pytest.approx(len(prompt + text), abs=6)


def test_plain_completions_of_several_prompts_stream(client: openai.OpenAI) -> None:
    prompts = ["one", "two, which is longer"]
    whole = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0, logprobs=1)
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert all(len(choice.logprobs.tokens) == 5 for choice in whole.choices if choice.logprobs)


async def test_the_async_client_streams_as_well(server: Any) -> None:
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="no key")
    messages: list[Any] = [user("hello")]
    stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True, max_tokens=4)
    assert len([chunk async for chunk in stream]) >= 2
    await client.close()


@pytest.mark.parametrize(
    "options",
    [
        {"stream": True, "stream_options": {"include_usge": True}},
        {"response_format": {"type": "json_object", "json_shema": {}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}},
        {"extra_body": {"temprature": 1}},
    ],
    ids=str,
)
def test_an_unknown_option_is_ignored_with_a_warning_or_refused(new_server: NewServer, options: dict[str, Any]) -> None:
    """Clients send names of other servers. All of them were refused."""
    with new_server() as server:
        raw = server.client().chat.completions.with_raw_response.create(
            model="tiny", messages=[user("hello")], max_tokens=2, **options
        )
        assert re.search("usge|shema|temprature", raw.headers["x-am-memory-warning"])
    with new_server(strict=True) as server:
        with pytest.raises(openai.BadRequestError, match="usge|shema|temprature") as refused:
            ask(server.client(), [user("hello")], **options)
        assert str(refused.value.param).rpartition(".")[2] in ("include_usge", "json_shema", "shema", "temprature")


def test_nulls_and_what_vllm_takes_are_unset(client: openai.OpenAI) -> None:
    """Clients that send every name they know, with null or -1 for what is not set, were refused."""
    names = (
        *("stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "n"),
        *("presence_penalty", "logit_bias", "max_tokens", "max_completion_tokens", "tools", "tool_choice", "user"),
        *("parallel_tool_calls", "response_format", "logprobs", "top_logprobs", "metadata", "mounts", "stream"),
        *("stream_options", "chat_template_kwargs", "continue_final_message", "add_generation_prompt", "model"),
        *("enable_thinking", "reasoning_effort", "unknown_to_all"),
    )
    message = {"role": "user", "content": "hello", "name": None, "tool_calls": None, "tool_call_id": None}
    body = {"messages": [message], **dict.fromkeys(names)}
    asked = client.post("/chat/completions", body=body, cast_to=openai.types.chat.ChatCompletion)
    assert asked.choices[0].message.content is not None
    same = [
        ask(client, [user("hello")], max_tokens=6, **options).choices[0].message.content
        for options in (
            {"extra_body": {"top_k": -1}},
            {"extra_body": {"top_k": 0}},
            {"stop": ""},
            {"stop": ["", "never said"]},
            {},
            {"logit_bias": {}},
            {"frequency_penalty": 0, "presence_penalty": 0},
            {"reasoning_effort": "low"},
        )
    ]
    assert len({*same}) == 1


def test_penalties_and_biases_change_what_is_said(client: openai.OpenAI) -> None:
    only = ask(client, [user("say it")], max_tokens=4, logit_bias={"65": 100})
    assert only.choices[0].message.content == "AAAA"
    never = ask(client, [user("say it")], max_tokens=4, logit_bias={"65": 60}, presence_penalty=2, frequency_penalty=2)
    assert never.choices[0].message.content == "AAAA"
    text = ask(client, [user("say it")], max_tokens=24).choices[0].message.content
    other = ask(client, [user("say it")], max_tokens=24, frequency_penalty=2).choices[0].message.content
    assert len({*other}) > len({*text})


def test_a_cut_answer_goes_on_from_its_last_token(client: openai.OpenAI) -> None:
    whole = ask(client, [user("tell a story")], max_tokens=12)
    first = ask(client, [user("tell a story")], max_tokens=6)
    begun = {"role": "assistant", "content": first.choices[0].message.content}
    rest = ask(client, [user("tell a story"), begun], max_tokens=6, extra_body={"continue_final_message": True})
    assert rest.usage.prompt_tokens_details.cached_tokens == rest.usage.prompt_tokens
    assert begun["content"] + rest.choices[0].message.content == whole.choices[0].message.content


def test_reasoning_comes_beside_the_answer(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was part of the text, and clients that left it out of the history had all of it read again."""

    def say(text: str) -> None:
        tokens = itertools.chain(text.encode(), itertools.repeat(257))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    say("<think>\ngreet\n</think>\n\nHi!")
    first = ask(client, [user("reason, please")], max_tokens=99)
    message = first.choices[0].message
    assert (message.content, message.reasoning_content) == ("Hi!", "greet")
    say("<think>\ngreet\n</think>\n\nHi!")
    deltas = [chunk.choices[0].delta for chunk in ask(client, [user("reason, please")], max_tokens=99, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "greet"
    assert "".join(delta.content or "" for delta in deltas) == "Hi!"
    say("Yes.")
    back = {"role": "assistant", "content": "Hi!"}
    again = ask(client, [user("reason, please"), back, user("sure?")], max_tokens=9)
    assert again.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens


def test_embeddings_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="makes no embeddings") as refused:
        client.embeddings.create(model="tiny", input="hello")
    assert refused.value.code == "embeddings_not_supported"


def test_texts_and_chats_are_tokenized_as_in_vllm(server: Server) -> None:
    with server.http() as http:
        plain = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
        assert plain == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]}
        chat = http.post("/tokenize", json={"messages": [user("hi")]}).json()
        asked = ask(server.client(), [user("hi")], max_tokens=1)
        assert chat["count"] == asked.usage.prompt_tokens
        text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert http.post("/detokenize", json={"tokens": [260]}).status_code == 400
        marked = {"messages": [user("hi")], "chat_template_kwargs": {"x": "<|im_end|>"}}
        assert http.post("/tokenize", json=marked).json()["error"]["param"].startswith("chat_template_kwargs.x")
        assert http.post("/tokenize", json={}).json()["error"]["message"] == "body: give one of prompt and messages"


@pytest.mark.parametrize("arguments", [{"a": 1}, None, [1, 2], '{"a": 1, "b', ""], ids=str)
def test_arguments_of_a_history_may_be_anything(client: openai.OpenAI, arguments: Any) -> None:
    """A call in the history whose arguments were not JSON, or not text, made every later request a 400."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [user("add"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "tool", "tool_call_id": "c1", "content": "Not run."}, user("go on")]
    assert ask(client, messages, max_tokens=2).choices


def test_strict_tools_and_single_calls_are_grammars(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server ignored `strict`, and ignored `parallel_tool_calls` in answers without a forced call."""
    written = '<tool_call>\n{"name": "add", "arguments": {"a": %s, "b": 3}}\n</tool_call>'

    def say(text: str) -> None:
        tokens = itertools.chain(text.encode(), itertools.repeat(257))
        monkeypatch.setattr("am_memory.session.generation.Sampler.choose", lambda self, logits, ids: next(tokens))

    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    say(written % 7)
    assert ask(client, [user("?")], max_tokens=99, tools=[TOOL]).choices[0].message.tool_calls
    say(written % 7)
    with pytest.raises(openai.BadRequestError, match="does not follow the grammar"):
        ask(client, [user("?")], max_tokens=99, tools=[strict])
    say(f"{written % 1}\n{written % 1}")
    one = ask(client, [user("?")], max_tokens=199, tools=[TOOL], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1
    form = {"name": "a", "schema": {"type": "array", "items": {"enum": [1]}, "uniqueItems": True}, "description": "A."}
    say("[1, 1]")
    answer = ask(client, [user("?")], max_tokens=99, response_format={"type": "json_schema", "json_schema": form})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("[1, 1]", "stop")
    assert "the answer does not follow its schema: [1,1] has non-unique elements" in caplog.text
