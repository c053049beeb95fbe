"""Random requests to all endpoints of the OpenAPI description: no request makes an internal error."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving import NewServer


@pytest.fixture(scope="module")
def description(new_server: NewServer) -> Any:
    with new_server(max_tokens=2, max_answer_tokens=8) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_no_request_breaks_the_server(description: Any) -> None:
    """Random requests to every operation, valid and invalid."""
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) >= 11
    for operation in operations:
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            def holds(case: schemathesis.Case) -> None:
                case.call_and_validate(
                    checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
                )

            try:
                holds()
            except Unsatisfiable:  # an operation that takes nothing cannot be called wrongly
                continue


ODD = ["\ud800", "\x00", "﷽" * 300, "<|im_start|>", "<|im_end|>", "{%raw%}", "𒐫" * 50, " ", "\u202e"]


@pytest.mark.parametrize("text", ODD, ids=lambda text: f"U+{ord(text[0]):04X}")
def test_odd_texts_break_nothing(description: Any, text: str) -> None:
    """Random requests are mostly refused; these get through to the model."""
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
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers, timeout=60)
        assert answer.status_code in (200, 400), answer.text
