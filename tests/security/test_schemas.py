"""Schemas that are sent to reach out, to hang or to break the check of an answer; that a test ends is its claim."""

from __future__ import annotations

import socket
from contextlib import suppress

import pytest

from am_memory.conversations.answer_format import AnswerFormat
from am_memory.conversations.chat_request import ChatRequest
from am_memory.conversations.tool_calls import ParsedCall
from am_memory.engines.transformers import TransformersEngine
from am_memory.errors import InvalidInput
from am_memory.text.constraints import json_schema
from am_memory.text.json_schemas import SchemaCheck, Unchecked

UNCHECKED = "cannot be checked against its schema: the schema has too many nested alternatives, or patterns"


@pytest.fixture
def answer_format(engine: TransformersEngine) -> AnswerFormat:
    parameters = {"type": "object", "properties": {"a": {"type": "string", **LOOKS}}}
    tool = {"type": "function", "function": {"name": "add", "strict": True, "parameters": parameters}}
    return AnswerFormat(engine, ChatRequest([{"role": "user", "content": "hello"}], tools=[tool]))


def nested(depth: int, value: object = "x") -> object:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("place", ["$ref", "$schema", "$dynamicRef", "$id"])
def test_nothing_is_fetched_for_a_schema(engine: TransformersEngine, place: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0)
        schema = {place: f"http://127.0.0.1:{listener.getsockname()[1]}/schema", "uniqueItems": True}
        for make in (lambda: json_schema(engine, schema), lambda: SchemaCheck(schema).problem_with([1])):
            with suppress(InvalidInput, Unchecked):
                make()
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    "pattern", ["^(?=a)(a+)+$", "^(?=a)(a|a)*$", r"^(?=a)(a*)*\1$", "^(?=a)(.*)(.*)(.*)(.*)(.*)b$"]
)
def test_a_pattern_that_would_be_tried_for_ever_is_given_up(pattern: str) -> None:
    with suppress(Unchecked):
        assert SchemaCheck({"type": "string", "pattern": pattern}).problem_with("a" * 5000 + "!")


LOOKS = {"pattern": "^(?:((?=a)a|(?=a)a)+b|a+)$"}  # takes 2^n backtracks for n letters


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (LOOKS, "a" * 14),
        ({"not": {"not": LOOKS}}, "a" * 14),
        ({"anyOf": [LOOKS, {"type": "null"}]}, "a" * 14),
        ({"propertyNames": LOOKS}, {"a" * 14: 1}),
        ({"patternProperties": {LOOKS["pattern"]: {}}, "additionalProperties": False}, {"a" * 14: 1}),
        ({"items": LOOKS, "uniqueItems": True}, ["a" * 14]),
    ],
)
def test_a_pattern_that_is_given_up_is_not_the_values_fault(schema: dict, value: object) -> None:
    with pytest.raises(Unchecked, match="a pattern backtracks too often"):
        SchemaCheck(schema).problem_with(value)


def several(number: int) -> list[dict]:
    return [{"pattern": f"^(?:((?=a)a|(?=a)a)+b{i}|a+)$"} for i in range(number)]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"items": {"not": {"not": {"allOf": several(400)}}}}, ["a" * 9] * 10),
        ({"items": {"allOf": several(50)}}, ["a" * 9] * 100),
        ({"propertyNames": {"allOf": several(400)}}, {"a" * 9 + str(i): 1 for i in range(10)}),
        ({"patternProperties": {each["pattern"]: {} for each in several(400)}}, {f"a{i}": 1 for i in range(10)}),
        ({"$defs": {"p": several(1)[0]}, "items": {"allOf": [{"$ref": "#/$defs/p"}] * 400}}, ["a" * 9] * 10),
        ({"pattern": "(?:(?=[ab]*a[ab]{500}c)b|[ab])*c"}, "ab" * 500),  # few backtracks, each of many states
        ({"pattern": "(?:(?=[ab]*a([ab]{50}){50}c)b|[ab])*c"}, "ab" * 500),
        ({"pattern": "(?:(?=a*b)a|a)*$c"}, "a" * 100_000),  # few backtracks, each over a long text
    ],
)
def test_many_patterns_at_many_texts_are_not_all_tried(
    monkeypatch: pytest.MonkeyPatch, schema: dict, value: object
) -> None:
    """Each of them stays below its own limit; all together held the device's thread for seconds."""
    check = SchemaCheck(schema)
    monkeypatch.setattr(check, "_validator", None)  # it is not even begun
    with pytest.raises(Unchecked, match=UNCHECKED):
        check.problem_with(value)


def test_a_strict_call_that_cannot_be_checked_is_a_call(answer_format: AnswerFormat) -> None:
    call = ParsedCall("add", {"a": "a" * 14})
    assert answer_format.checked_call(call) is call
    assert "the arguments of add are not checked: it cannot be checked" in str(answer_format.schema_error)


R = {"$ref": "#"}
DOUBLING = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
LEVELS = {f"d{i}": {"anyOf": [{"items": {"$ref": f"#/$defs/d{i + 1}"}}] * 2, "uniqueItems": True} for i in range(40)}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"anyOf": [{"type": "array", "items": R}, {"type": "array", "items": R}, {"type": "null"}]}, nested(40)),
        ({"allOf": [{"items": R}, {"items": R}]}, nested(40)),
        ({"if": {"items": R}, "then": {"items": R}, "else": {"items": R}}, nested(40)),
        ({"$ref": "#/$defs/d0", "$defs": {**DOUBLING, "d40": {"type": "integer"}}}, "x"),
        ({"$ref": "#/$defs/d0", "$defs": {**LEVELS, "d40": {"type": "integer"}}}, nested(40)),
        ({"anyOf": [R, R]}, "x"),  # refers to itself, and to nothing else
        ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "x"),
        ({"type": "array", "items": R}, nested(3000)),
        ({"enum": [0], "items": {"enum": [*range(3)]}}, nested(200)),
    ],
)
def test_alternatives_within_each_other_are_not_all_tried(schema: dict, value: object) -> None:
    with pytest.raises(Unchecked, match=UNCHECKED):
        SchemaCheck(schema).problem_with(value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"properties": {"left": {"anyOf": [R, {"type": "null"}]}, "right": {"anyOf": [R, {"type": "null"}]}}}, "tree"),
        ({"type": "object", "properties": {f"p{i}": {"enum": [*range(20)]} for i in range(400)}}, {f"p{i}": i % 20 for i in range(400)}),
        ({"items": {"pattern": r"^(?=.*\d)(?=.*[a-z])[a-z\d-]{8,40}$"}}, [f"item-{i:04}" for i in range(200)]),
        ({"items": {"pattern": r"^[A-Z]{3}-\d{1,50}$"}, "uniqueItems": True}, [f"ABC-{i}" for i in range(5000)]),
        ({"properties": {"text": {"pattern": r"^(?!\s).*\S$"}}}, {"text": "words of an answer " * 500 + "."}),
        ({"type": "array", "items": {"anyOf": [{"const": i} for i in range(40)]}}, [i % 40 for i in range(1000)]),
    ],
)  # fmt: skip
def test_large_answers_of_honest_schemas_are_checked(schema: dict, value: object) -> None:
    if value == "tree":
        value = None
        for _ in range(9):
            value = {"left": value, "right": value}
    assert SchemaCheck(schema).problem_with(value) is None


def test_schemas_too_deep_to_be_read_are_refused(engine: TransformersEngine) -> None:
    schema: dict = {"type": "integer"}
    for _ in range(5000):
        schema = {"items": schema}
    for make in (lambda: json_schema(engine, schema), lambda: SchemaCheck(schema)):
        with pytest.raises(InvalidInput):
            make()


@pytest.mark.parametrize("text", ['"}} x: /.*/', "\n\nstart: /.*/", "\\u0000", "</tool_call>", "\u2028", "%json {}"])
def test_no_text_of_a_schema_is_a_rule_of_the_grammar(engine: TransformersEngine, text: str) -> None:
    constraint = json_schema(engine, {"type": "object", "properties": {text: {"const": text}}, "required": [text]})
    with pytest.raises(InvalidInput, match="does not follow the grammar"):
        constraint.accept(ord("x"))
    constraint.accept(ord("{"))
