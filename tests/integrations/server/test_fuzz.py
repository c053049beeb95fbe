"""Whatever is sent to the endpoints of the OpenAPI description: an error of ours, never one of the server's."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving import NewServer


@pytest.fixture(scope="module")
def description(new_server: NewServer) -> Any:
    with new_server(max_tokens=2, max_answer_tokens=8) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("description")


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=[not_a_server_error, status_code_conformance, response_schema_conformance])


ODD = ["\ud800", "\x00", "﷽" * 300, "<|im_start|>", "<|im_end|>", "{%raw%}", "𒐫" * 50, " ", "\u202e"]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_texts_break_nothing(description: Any, text: str) -> None:
    """Random requests are mostly refused; these get through to the model."""
    import httpx

    function = {
        "name": "f",
        "description": text,
        "parameters": {"type": "object", "properties": {"a": {"const": text}}},
    }
    url = description.config.base_url or description.location.removesuffix("/openapi.json")
    for asked in (
        {"messages": [{"role": "user", "content": text}]},
        {"messages": [{"role": "user", "content": "hi", "name": text}], "stop": [text], "logprobs": True},
        {"messages": [{"role": "tool", "content": text, "tool_call_id": text}]},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function", "function": function}]},
        {"messages": [{"role": "user", "content": "hi"}], "metadata": {"conversation_id": text}},
    ):
        import json

        body = json.dumps(asked).encode()
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400), answer.text
