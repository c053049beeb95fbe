"""Requests that no client should send: each gets a client error in the form of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import httpx
import pytest
from am_memory_server import json_bodies
from am_memory_server.json_bodies import num_values
from am_memory_server.request_schemas import ChatCompletionRequest
from pydantic import ValidationError
from serving import NewServer

CHAT, TEXT, SESSIONS = "/v1/chat/completions", "/v1/completions", "/v1/memory/sessions"
MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}, "b": {"type": "integer"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
KNOWN_CODES = (200, 201, 400, 404, 409)


@pytest.fixture(scope="module")
def http(new_server: NewServer) -> Iterator[httpx.Client]:
    with new_server(max_tokens=2, max_answer_tokens=4) as server, server.http() as http:
        yield http


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Post a body as it is, or as JSON in Python's sense."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"Content-Type": "application/json"})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, which must be a client error."""
    assert 400 <= answer.status_code < 500, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= 1100
    return error


def nested(depth: int, opening: str, closing: str, core: str = "1") -> bytes:
    return (opening * depth + core + closing * depth).encode()


NESTS = {"lists": ("[", "]"), "objects": ('{"a":', "}"), "schemas": ('{"anyOf":[', "]}"), "items": ('{"items":', "}")}
PLACES = {
    "messages": b'{"messages": %s}',
    "content": b'{"messages": [{"role": "user", "content": %s}]}',
    "metadata": b'{"messages": [{"role": "user", "content": "hi"}], "metadata": {"a": %s}}',
    "parameters": b'{"messages": [{"role": "user", "content": "hi"}], "tools": '
    b'[{"type": "function", "function": {"name": "f", "parameters": {"not": %s}}}]}',
    "response_format": b'{"messages": [{"role": "user", "content": "hi"}], "response_format": '
    b'{"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": %s}}}}}',
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", 1),
        (b'{"a": [1, {"b": null}]}', 7),
        (b"[" + b"[]," * 50 + b"1]", 102),
        (rb'["' + rb"{[,:" * 99 + rb'"]', 2),
        (rb'["' + rb"\",\\\"," * 99 + rb'"]', 2),  # an escaped quote does not end a text
        (rb'["\\",' + b'"",' * 99 + b'""]', 101),
        (b'"",' * 99 + b'"', 99),
    ],
)
def test_values_are_counted_outside_of_texts(body: bytes, expected: int) -> None:
    """A lower limit never makes the estimate larger."""
    assert num_values(body, 5) == expected
    assert num_values(body, 10**6) >= expected


BODIES = {
    "empty lists": b'{"messages": [{"role": "user", "content": "a", "x": [' + b",".join([b"[]"] * 200) + b"]}]}",
    "texts": b'{"prompt": [' + b",".join([b'""'] * 200) + b"]}",
    "unclosed": b"[" * 1000,
}


@pytest.mark.parametrize("path", [CHAT, TEXT, f"{SESSIONS}/a/fork"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_with_too_many_values_is_refused_before_it_is_parsed(
    new_server: NewServer, monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    """5 million empty lists in 14 MiB delayed everybody for seconds, and took 400 MiB."""
    monkeypatch.setattr(json_bodies, "from_json", lambda *values, **options: pytest.fail("it was read"))
    with new_server(max_body_values=100) as server, server.http() as http:
        answer = post(http, path, BODIES[kind])
    assert answer.status_code == 413
    assert "the limit is 100: send fewer" in error_of(answer)["message"]


def test_a_text_counts_as_one_value(new_server: NewServer) -> None:
    with new_server(max_body_values=50) as server, server.http() as http:
        messages = [{"role": "user", "content": '{"a": [1, 2, "b"]}, ' * 20}]
        assert post(http, CHAT, {"messages": messages, "max_tokens": 1}).status_code == 200


def test_too_many_messages_are_refused_before_any_is_validated() -> None:
    with pytest.raises(ValidationError, match="there are 20001 messages: send 20000 at most") as refused:
        ChatCompletionRequest.model_validate({"messages": [0] * 20_001})
    assert refused.value.error_count() == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", NESTS)
def test_deep_nesting_is_the_clients_error(http: httpx.Client, place: str, kind: str) -> None:
    """Python's parser accepted them, and validation overflowed the stack."""
    for depth in (1000, 50_000):
        answer = post(http, CHAT, PLACES[place] % nested(depth, *NESTS[kind]))
        assert error_of(answer)["code"] == "invalid_json"
        assert "recursion limit" in answer.text
    assert post(http, CHAT, PLACES[place] % nested(60, *NESTS[kind])).status_code in KNOWN_CODES


@pytest.mark.parametrize("arguments", ["[" * 3000, '{"a":' * 3000, "[" * 3000 + "]" * 3000])
def test_arguments_that_are_nested_too_deep_reach_the_model_as_text(http: httpx.Client, arguments: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    told = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answer = post(http, CHAT, {"messages": [*told, {"role": "tool", "tool_call_id": "1", "content": "r"}]})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', "9" * 5000, "{", "'a'", "01", "\x00", '"\x01"'],
)
def test_a_body_that_is_not_json_is_refused(http: httpx.Client, value: str) -> None:
    for body in (f'{{"prompt": {value}}}', f'{{"prompt": "a", "seed": {value}}}', f'{{"prompt": ["a", {value}]}}'):
        error = error_of(post(http, TEXT, body.encode()))
        assert (error["code"], error["param"]) == ("invalid_json", None)


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"5", b'"text"', b"\xff\xfe{}", b'{"a": 1} {}', b"\xef\xbb\xbf{}"]
)
def test_a_body_that_is_not_an_object_is_refused(http: httpx.Client, body: bytes) -> None:
    for path in (CHAT, TEXT, f"{SESSIONS}/a/compact", f"{SESSIONS}/a/fork"):
        assert error_of(post(http, path, body))["param"] is None


def test_an_infinite_number_in_a_schema_is_refused(http: httpx.Client) -> None:
    tool = b'{"type": "function", "function": {"name": "f", "parameters": {"minimum": 1e999}}}'
    answer = post(http, CHAT, b'{"messages": [{"role": "user", "content": "hi"}], "tools": [%s]}' % tool)
    assert error_of(answer)["param"] == "tools.0.function.parameters"


def test_an_error_says_where_and_why_in_words_of_the_api(http: httpx.Client) -> None:
    """Errors spoke of Python: `Value error`, dictionaries, and a parser's `at line 1 column 15`."""
    broken = error_of(post(http, CHAT, b'{"messages": nope}'))["message"]
    assert broken == "the body cannot be read as JSON: line 1, column 15: expected ident"
    wrong = error_of(post(http, CHAT, {"messages": [{"role": "user"}]}))["message"]
    assert wrong == "messages.0: a user message needs content"
    kinds = error_of(post(http, CHAT, {"messages": {}, "metadata": []}))["message"]
    assert kinds == "messages: it should be a valid JSON array; metadata: it should be a valid JSON object"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": MESSAGES, "tool_choice": 5}, "tool_choice"),
        (CHAT, {"messages": MESSAGES, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            CHAT,
            {"messages": MESSAGES, "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
        ),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0"),
        (CHAT, {"messages": MESSAGES, "metadata": {"a": 1}}, "metadata.a"),
        (CHAT, {"messages": MESSAGES, "stop": ["a", "b" * 1001]}, "stop.1"),
        (TEXT, {"prompt": "hi", "stop": ["a"] * 17}, "stop"),
        (f"{SESSIONS}/a/compact", {"nonsense": 1}, "nonsense"),
        (TEXT, {"prompt": {}}, "prompt"),
        (TEXT, {"prompt": [1, "a"]}, "prompt.1"),
        (TEXT, {"prompt": "a", "temperature": "hot"}, "temperature"),
        (f"{SESSIONS}/a/compact", {"fraction": 2}, "fraction"),
    ],
)
def test_an_error_names_the_parameter_by_its_path_in_the_request(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    """The path once contained the types that pydantic tried: `prompt.list[constrained-int].0`, `body.17`."""
    assert error_of(post(http, path, body))["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param", "meant"),
    [
        (CHAT, {"messages": MESSAGES, "max_token": 4}, "max_token", "max_tokens"),
        (TEXT, {"prompt": "a", "temperatur": 0}, "temperatur", "temperature"),
        (CHAT, {"messages": MESSAGES, "stream_options": {"include_usag": True}}, "stream_options.include_usag", None),
        (f"{SESSIONS}/a/compact", {"fractoin": 0.5}, "fractoin", "fraction"),
        (CHAT, {"messages": MESSAGES, "z" * 10**6: 1}, "z" * 100, ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    new_server: NewServer, path: str, body: dict[str, Any], param: str, meant: str | None
) -> None:
    """By a server that is strict. A body of this server's own API is always refused."""
    with new_server(strict=True) as server, server.http() as http:
        error = error_of(post(http, path, body))
    assert error["param"] == param
    expected = "include_usage" if meant is None else meant
    assert (f"(did you mean {expected}?)" in error["message"]) == bool(expected)
    assert f"there is no {param.rpartition('.')[2]}" in error["message"]


def test_an_error_message_is_short_for_a_long_request(http: httpx.Client) -> None:
    error_of(post(http, f"{SESSIONS}/a/compact", {"x" * 100_000: 1}))
    warned = post(http, CHAT, {"messages": MESSAGES, "é" * 100_000: 1})
    assert warned.status_code == 200
    assert len(warned.headers["X-AM-Memory-Warning"]) <= 510


@pytest.mark.parametrize("name", ["", " ", "a\r\nSet-Cookie: b", "\x00", "é"])
def test_an_odd_unknown_name_makes_no_bad_header(http: httpx.Client, name: str) -> None:
    answer = post(http, CHAT, {"messages": MESSAGES, name: 1})
    assert answer.status_code == 200
    assert "ignored" in answer.headers["X-AM-Memory-Warning"]
    assert "set-cookie" not in answer.headers
    error_of(post(http, CHAT, {"messages": MESSAGES, "model": "x" * 100_000}))
    error_of(http.get(f"/v1/models/{'x' * 10_000}"))
    error_of(http.get(f"{SESSIONS}/{'x' * 10_000}"))


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [[]] * 50_000},
        {"messages": [{"role": "assistant", "tool_calls": [[]] * 50_000}]},
        {"messages": MESSAGES, "metadata": {str(number): 1 for number in range(50_000)}},
        {"messages": MESSAGES, "logit_bias": {str(number): "a" for number in range(50_000)}},
        {"messages": MESSAGES, **{f"name {number}": 1 for number in range(50_000)}},
        {"messages": MESSAGES, "modalities": [1] * 50_000, "stop": [1] * 50_000, "tools": [1] * 50_000},
    ],
    ids=["messages", "calls", "metadata", "bias", "names", "lists"],
)
def test_many_problems_in_one_request_take_little_memory(body: dict[str, Any]) -> None:
    """Five million empty lists as messages, 15 MB, once took 40 s and 6 GB for their errors."""
    with pytest.raises(ValidationError) as refused:
        ChatCompletionRequest.model_validate(body)
    assert refused.value.error_count() < 200


NUMBERS = (
    *("0", "-0.0", "-1", "1", "0.5", "2", "5e-324", "1e-45", "1e-39", "1e-30", "0.9999999999999999", "1e39", "1e308"),
    *("1e999", "-1e999", "2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400),
)


@pytest.mark.parametrize(
    "field",
    [
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "n", "logprobs"),
        *("frequency_penalty", "presence_penalty", "stream", "stop", "model", "user", "logit_bias", "prompt"),
    ],
)
def test_no_number_in_any_field_makes_an_internal_error(http: httpx.Client, field: str) -> None:
    """A temperature of 1e-39 once did."""
    for number in NUMBERS:
        others = {"prompt": '"a"', "max_tokens": "2", "temperature": "1", "seed": "1", field: number}
        body = "{" + ", ".join(f'"{name}": {value}' for name, value in others.items()) + "}"
        assert post(http, TEXT, body.encode()).status_code in (200, 400), number


def nest_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(800)}},
        {"type": "integer", "multipleOf": 987654321},
        nest_of(70),
    ],
    ids=["properties", "multipleOf", "levels"],
)
def test_a_schema_that_is_too_large_is_refused_as_such(http: httpx.Client, schema: dict[str, Any]) -> None:
    """The error once said that it is not a grammar, or that an allowed token does not follow it."""
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    error = error_of(post(http, CHAT, {"messages": MESSAGES, "response_format": form}))
    assert "the schema or grammar is too large: give it fewer properties" in error["message"]


SOUND: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}),
    (
        CHAT,
        {"messages": MESSAGES, "temperature": 1.0, "top_p": 0.9, "stop": ["a"], "logprobs": True, "top_logprobs": 3},
    ),
    (CHAT, {"messages": MESSAGES, "stream": True, "stream_options": {"include_memory": True}, "user": "u"}),
    (CHAT, {"messages": MESSAGES, "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}),
    (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    (TEXT, {"prompt": ["a", "b"], "logprobs": 2, "seed": 1, "stream": True}),
    (TEXT, {"prompt": [1, 2, 3], "suffix": "", "echo": False}),
    (f"{SESSIONS}/u/compact", {"fraction": 0.5}),
    (f"{SESSIONS}/u/fork", {"id": "v"}),
]
ODD: list[Any] = [
    *(None, True, 0, -1, 1e-39, 1e308, 2**63, 10**30, "", "\x00", "\u202e", "a" * 300, "<|im_end|>", "{{7*7}}", "../x"),
    *(
        [],
        {},
        [[]],
        [None],
        {"": ""},
        [1] * 300,
        {"$ref": "#"},
        {"$ref": "#/no"},
        {"type": "object", "required": ["z"]},
    ),
    *(
        {"pattern": "("},
        {"type": "string", "minLength": 10**9},
        {"enum": []},
        {"anyOf": []},
        {"not": {}},
        {"a": {"a": 1}},
    ),
]


def mutated(random: Random, value: Any) -> Any:
    """The same request with one value changed, removed, repeated or added."""
    if isinstance(value, dict | list) and value and random.random() < 0.8:
        changed = dict(value) if isinstance(value, dict) else list(value)
        place: Any = random.choice([*value] if isinstance(value, dict) else range(len(value)))
        if random.random() < 0.1:
            del changed[place]
        elif random.random() < 0.1 and isinstance(changed, dict):
            changed[random.choice(["name", "type", "required", "x", "$ref", "content"])] = random.choice(ODD)
        else:
            changed[place] = mutated(random, value[place])
        return changed
    return random.choice([*ODD, [value], [value] * 3])


@pytest.mark.parametrize("seed", range(4))
def test_no_mutated_request_makes_an_internal_error(http: httpx.Client, seed: int) -> None:
    random = Random(seed)
    for _ in range(100):
        path, sound = random.choice(SOUND)
        body = mutated(random, sound)
        answer = post(http, path, body)
        assert answer.status_code in KNOWN_CODES, (path, body, answer.text)
        assert "server_error" not in answer.text, (path, body, answer.text)
        if answer.status_code >= 400:
            error_of(answer)


@pytest.mark.parametrize("required", [[["a"]], [{}], [1], [None], "a", {"a": 1}])
@pytest.mark.parametrize("place", ["tools", "response_format"])
def test_a_schema_with_an_impossible_name_is_the_clients_error(http: httpx.Client, required: Any, place: str) -> None:
    schema = {**SCHEMA, "required": required}
    forms = {
        "tools": [{"type": "function", "function": {**FUNCTION, "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    choice = {"tool_choice": "required"} if place == "tools" else {}
    assert post(http, CHAT, {"messages": MESSAGES, place: forms[place], **choice}).status_code in (200, 400)
