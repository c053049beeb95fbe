"""Several answers to one prompt: the prompt is read once, and the answers share their passes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import openai
import pytest
from serving import NewServer, until

QUESTION = {"role": "user", "content": "What do owls eat, and where do they live in winter?"}


def ask(client: openai.OpenAI, **options: Any) -> Any:
    sampled = {"temperature": 1.0, "seed": 5, "max_tokens": 10, **options}
    return client.chat.completions.create(model="tiny", messages=[QUESTION], **sampled)  # type: ignore[call-overload]


def complete(client: openai.OpenAI, **options: Any) -> Any:
    sampled = {"temperature": 1.0, "seed": 5, "max_tokens": 10, **options}
    return client.completions.create(model="tiny", **sampled)


def test_answers_share_the_prompt_and_their_passes(new_server: NewServer, pass_sizes: list[int]) -> None:
    with new_server() as server:
        alone = ask(server.client())
    pass_sizes.clear()
    with new_server() as server:
        several = ask(server.client(), n=3, logprobs=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].message.content == alone.choices[0].message.content
    assert len({choice.message.content for choice in several.choices}) == 3
    assert several.usage.prompt_tokens == alone.usage.prompt_tokens
    counts = [len(choice.logprobs.content) for choice in several.choices]
    assert sum(counts) <= several.usage.completion_tokens <= sum(counts) + 3  # the ends of turns count too
    assert max(pass_sizes) == 3


def test_the_conversation_keeps_the_first_answer(new_server: NewServer) -> None:
    with new_server() as server:
        client = server.client()
        first = ask(client, n=2).choices[0].message.content
        told = [QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
        again = client.chat.completions.create(model="tiny", messages=told, max_tokens=2)  # type: ignore[arg-type]
        known = ask(client, n=1, max_tokens=1).usage
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens > known.prompt_tokens
        assert len(server.service.threads.all_branches()) <= 3


def test_a_stream_says_which_answer_goes_on(new_server: NewServer) -> None:
    with new_server() as server:
        whole = ask(server.client(), n=2)
    with new_server() as server:
        texts, ends = defaultdict[int, str](str), dict[int, str]()
        stream = ask(server.client(), n=2, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert [*texts.values()] == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunk.usage.completion_tokens == whole.usage.completion_tokens


def test_answers_of_a_fixed_format_have_a_grammar_each(new_server: NewServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    with new_server() as server:
        several = ask(server.client(), n=3, response_format=form, max_tokens=60)
    for choice in several.choices:
        assert choice.message.content.replace(" ", "").replace("\n", "") in ('{"a":true}', '{"a":false}')


def test_plain_prompts_have_completions_one_after_the_other(new_server: NewServer, pass_sizes: list[int]) -> None:
    with new_server() as server:
        alone = [complete(server.client(), prompt=text).choices[0].text for text in ("The owl", "A sea of")]
    with new_server() as server:
        several = complete(server.client(), prompt=["The owl", "A sea of"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [several.choices[0].text, several.choices[2].text] == alone
    assert max(pass_sizes) == 2


def test_the_best_of_several_completions_is_the_likeliest(new_server: NewServer) -> None:
    with new_server() as server:
        client = server.client()
        every = complete(client, prompt="The owl", n=4, logprobs=0).choices
    with new_server() as server:
        client = server.client()
        best = complete(client, prompt="The owl", n=1, best_of=4)
        for wrong, reason in [({"n": 3, "best_of": 2}, "at least n"), ({"best_of": 2, "stream": True}, "stream")]:
            with pytest.raises(openai.BadRequestError, match=reason):
                complete(client, prompt="The owl", **wrong)
    likely = max(every, key=lambda choice: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs))
    assert [choice.text for choice in best.choices] == [likely.text]
    assert best.usage.completion_tokens >= 40 - 4


def test_a_client_that_leaves_ends_all_answers(new_server: NewServer) -> None:
    with new_server() as server:
        stream = ask(server.client(), n=3, stream=True, max_tokens=4000)
        next(stream)
        stream.close()
        scheduler = server.service.scheduler
        until(lambda: scheduler.num_active == 0)
        assert server.service.threads.all_branches() == []
