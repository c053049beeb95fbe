"""The server with llama.cpp: a conversation far longer than its cache, and a forced tool call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import POLICY, Server, running

from am_memory import Memory
from am_memory.engines.llama_cpp import LlamaCppEngine

DIGITS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@pytest.fixture
def server(llama: LlamaCppEngine) -> Iterator[Server]:
    with running(Memory(llama, POLICY)) as server:
        yield server


def test_a_long_conversation_reads_only_what_is_new(server: Server) -> None:
    client, messages, known = server.client(), [], 0
    for number in range(8):
        messages.append({"role": "user", "content": f"{number}, and this is one of several long messages"})
        answer: Any = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
        assert answer.usage.prompt_tokens_details.cached_tokens == known
        known = answer.usage.total_tokens
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    with server.http() as http:
        (session,) = http.get("/v1/memory/sessions").json()["data"]
    assert session["stats"]["num_compactions"] >= 2
    assert session["stats"]["kv_tokens"] <= 300 < session["stats"]["logical_tokens"]


def test_a_tool_is_called_when_it_must_be(server: Server) -> None:
    tool: Any = {"type": "function", "function": {"name": "count", "description": "Count.", "parameters": DIGITS}}
    answer: Any = server.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "count"}],
        tools=[tool],
        tool_choice="required",
        max_tokens=200,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "count"
    assert json.loads(call.function.arguments)["a"] in (1, 2)
