"""Values against schemas: what is wrong is named, and what a schema cannot mean is refused."""

from __future__ import annotations

import json

import pytest

from am_memory.errors import InvalidInput
from am_memory.text.json_schemas import SchemaCheck, for_grammar, left_out_by


def test_what_is_wrong_is_named_with_its_place() -> None:
    check = SchemaCheck(
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}}
    )
    assert check.problem_with({"a": [1, 2]}) is None
    assert check.problem_with({"a": [1, "x"]}) == """['a'][1]: "x" is not of type "integer\""""
    assert check.problem_with({"a": [1, 1]}) == "['a']: [1,1] has non-unique elements"


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"pattern": r"^(?=.*\d)[a-z\d]+$"}, "a1", "ab"),
        ({"not": {"type": "string"}}, 3, "x"),
        ({"propertyNames": {"minLength": 2}}, {"ab": 1}, {"a": 1}),
        ({"contains": {"const": 3}}, [1, 3], [1]),
        ({"dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 2}, {"a": 1}),
        ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"c": 1}, {"a": 1}),
        ({"oneOf": [{"minimum": 3}, {"maximum": 5}]}, 9, 4),
        ({"format": "uri-reference"}, "a/b", "a b"),
        ({"format": "path"}, "a b", None),
        ({"items": [{"type": "integer"}]}, [1], ["x"]),  # draft 7
        ({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}, 4, 3),  # draft 4
    ],
)
def test_what_no_grammar_holds_is_checked(schema: dict, right: object, wrong: object) -> None:
    check = SchemaCheck(schema)
    assert check.problem_with(right) is None
    assert wrong is None or check.problem_with(wrong)


def test_a_pattern_that_is_none_is_not_looked_at() -> None:
    """JSON Schema's patterns are those of ECMAScript; people send those of other languages."""
    assert SchemaCheck({"type": "string", "pattern": r"a\Z"}).problem_with("b") is None
    closed = {"type": "object", "patternProperties": {"a(": {}}, "additionalProperties": False}
    assert SchemaCheck(closed).problem_with({"b": 1}) is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "ship"}, "this is no JSON schema"),
        ({"$ref": "https://example.com/a"}, "this is no JSON schema: .*https://example.com/a"),
        ([], "not a JSON schema: give a mapping"),
        ({"const": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_what_is_no_schema_is_refused(schema: object, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SchemaCheck(schema)


def test_names_of_properties_become_properties_where_that_says_the_same() -> None:
    listed = json.loads(for_grammar({"propertyNames": {"enum": ["a"]}, "additionalProperties": {"type": "null"}}).text)
    assert (listed["properties"], listed["additionalProperties"]) == ({"a": {"type": "null"}}, False)
    by_pattern = json.loads(for_grammar({"propertyNames": {"pattern": "^a"}}).text)
    assert by_pattern["patternProperties"] == {"^a": True}
    for kept in ({"propertyNames": {"minLength": 2}}, {"propertyNames": {"enum": ["a"]}, "properties": {}}):
        assert "propertyNames" in json.loads(for_grammar(kept).text)


def test_a_format_that_says_nothing_of_a_value_is_not_missed() -> None:
    warnings = [
        "Unknown format: path",
        "Unknown format: iri",
        'Unimplemented keys: ["if", "then"]',
        "oneOf not fully supported, falling",
    ]
    assert left_out_by([*warnings, "something new"]) == {"format iri", "if", "then", "oneOf", "something new"}
