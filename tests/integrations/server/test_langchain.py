"""LangChain's `ChatOpenAI`, which knows nothing of this project, against the server."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from serving import Server


class Size(BaseModel):
    """How large something is."""

    size: Literal["small", "large"]


@tool
def pick(colour: Literal["red", "blue"]) -> str:
    """Pick a colour."""
    return f"you have {colour}"


@pytest.fixture
def model(server: Server) -> ChatOpenAI:
    url, key = f"{server.url}/v1", SecretStr("no key")
    return ChatOpenAI(
        model="tiny",
        base_url=url,
        api_key=key,
        temperature=0,
        max_retries=0,
        stream_usage=True,
        max_completion_tokens=200,
    )


def cached(message: Any) -> int:
    return int(message.usage_metadata["input_token_details"]["cache_read"])


def test_it_answers_and_reports_cached_tokens(model: ChatOpenAI) -> None:
    question = HumanMessage("a question of LangChain's")
    answer = model.invoke([question], max_completion_tokens=6)
    second = model.invoke([question, answer, HumanMessage("and?")], max_completion_tokens=6)
    assert isinstance(answer, AIMessage)
    assert cached(second) == answer.usage_metadata["total_tokens"]  # type: ignore[index]


def test_a_conversation_can_be_named(model: ChatOpenAI, server: Server) -> None:
    model.bind(extra_body={"metadata": {"conversation_id": "named by LangChain"}}).invoke("hi", max_completion_tokens=2)
    with server.http() as http:
        assert http.get("/v1/memory/sessions/named by LangChain").status_code == 200


def test_it_streams(model: ChatOpenAI) -> None:
    chunks = list(model.stream("stream for LangChain", max_completion_tokens=8))
    whole = model.invoke("stream for LangChain", max_completion_tokens=8)
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    assert any(chunk.usage_metadata for chunk in chunks)


def test_it_calls_tools_and_reads_their_results(model: ChatOpenAI) -> None:
    question = HumanMessage("pick one")
    call = model.bind_tools([pick], tool_choice="pick", parallel_tool_calls=False).invoke([question])
    assert call.tool_calls[0]["args"]["colour"] in ("red", "blue")
    result = pick.invoke(call.tool_calls[0])
    assert isinstance(result, ToolMessage)
    answer = model.bind_tools([pick]).invoke([question, call, result], max_completion_tokens=4)
    assert cached(answer) > 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_it_gives_structured_output(model: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    found = model.with_structured_output(Size, method=method).invoke("how large?")
    assert isinstance(found, Size)


async def test_it_streams_asynchronously(model: ChatOpenAI) -> None:
    chunks = [chunk async for chunk in model.astream("stream again", max_completion_tokens=5)]
    assert len(chunks) > 1
