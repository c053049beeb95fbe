"""JSON schemas in the form that a grammar can hold, what of them it cannot, and the check of an answer afterwards.

Knows no tokens and no engine. Nothing is fetched from anywhere, and how long a check may take is bounded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import jsonschema_rs
from jsonschema_rs import ValidationErrorKind as _Kind
from llguidance import LLMatcher

from am_memory.errors import InvalidInput

Schema = dict[str, object]

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
"""JSON is written as `json.dumps` writes it: free whitespace is where a small model never comes to an end."""

MAX_CHECK_STEPS = 2_000_000
"""Looks at a value; a schema of many alternatives within each other would ask for more than anybody waits for."""
MAX_CHECK_DEPTH = 64
MAX_BACKTRACKS = 1_000
"""Of one pattern at one text; each may cost as much as a step of the check does."""
CHARS_PER_STEP = 8
"""Of a text that a pattern, or anything else, looks at in one step."""
MAX_REASON_CHARS = 300

_LOOKS_BACK = re.compile(r"\(\?(?!:)|\\[^dDsSwWbBnrtfv.^$*+?()\[\]{}|/-]|[+*?}]\+")
"""In patterns that may backtrack: lookaround, references, and what else is more than a regular expression."""
_REPEATS = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")

_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_IN_PLACE = ("not", "if", "then", "else")
_OF_ITEMS = ("items", "additionalItems", "additionalProperties", "contains")
_SINGLE = (*_OF_ITEMS, *_IN_PLACE, "propertyNames", "unevaluatedItems", "unevaluatedProperties")
_CONDITIONS = {"if", "then", "else", "dependentSchemas", "dependentRequired"}
_CHECKED_FORMATS = {
    *("idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex"),
    *("relative-json-pointer", "uri-reference", "uri-template"),
}
"""Those of the standard that no grammar holds; any format that the standard does not name says nothing of a value."""


@dataclass(frozen=True)
class GrammarSchema:
    """A schema as a grammar of llguidance takes it.

    Attributes:
        text: JSON.
        left_out: keywords that it had and the grammar has not.
    """

    text: str
    left_out: frozenset[str]


def for_grammar(schema: object) -> GrammarSchema:
    """The schema with what a grammar can hold, on one line, and closed where it says nothing of further properties.

    Raises:
        InvalidInput: the schema is not JSON.
    """
    copy = _copied(schema)
    left_out = set()
    for part in list(_parts(copy)):
        _name_properties(part, copy)
        left_out |= _drop_patterns(part, _is_regular)
    _close(copy)
    return GrammarSchema(json.dumps({**copy, "x-guidance": JSON_FORM}), frozenset(left_out))


def left_out_by(warnings: Iterable[str]) -> set[str]:
    """The keywords that llguidance says it leaves out of a grammar; a format that is an annotation is none."""
    found: set[str] = set()
    for warning in warnings:
        if unknown := re.fullmatch(r"Unknown format: (.*)", warning, re.DOTALL):
            found |= {f"format {unknown[1]}"} & {f"format {name}" for name in _CHECKED_FORMATS}
        elif keys := re.fullmatch(r"Unimplemented keys: (\[.*\])", warning, re.DOTALL):
            found |= {*json.loads(keys[1])}
        else:
            found.add("oneOf" if warning.startswith("oneOf") else warning)
    return found


class Unchecked(Exception):
    """Whether a value is of a schema is not known: finding it out would take too long. No fault of the value's."""


class Check:
    """Whether a value is of a schema, all of it.

    Patterns are those of JSON Schema; one that is no pattern there is not looked at.
    A check has one budget, `MAX_CHECK_STEPS`, for all that its schema and its patterns may look at in a value.

    Raises:
        InvalidInput: the schema is none, or refers to something outside of it.
    """

    def __init__(self, schema: object) -> None:
        self._schema = _copied(schema)
        for part in list(_parts(self._schema)):
            _drop_patterns(part, _is_pattern)
        self._validator = _validator(self._schema)

    def problem_with(self, value: object) -> str | None:
        """What is wrong with a value; None where it is of the schema.

        Raises:
            Unchecked: it would take too long.
        """
        try:
            depth, size = _depth_and_size(value)
            num_steps = _Steps(self._schema).along(self._schema, depth) * size
        except RecursionError:
            num_steps = MAX_CHECK_STEPS + 1
        if num_steps > MAX_CHECK_STEPS:
            raise Unchecked(
                "it cannot be checked against its schema: there are too many alternatives within each other, or "
                "patterns"
            )
        error = next(self._validator.iter_errors(value), None)
        if error is None:
            return None
        if isinstance(error.kind, (_Kind.BacktrackLimitExceeded, _Kind.RegexEngineFailure)):
            raise Unchecked("it cannot be checked against its schema: a pattern is tried for too long")
        place = "".join(f"[{step!r}]" for step in error.instance_path)
        return f"{place + ': ' if place else ''}{_shortened(error.message)}"


def _validator(schema: Schema) -> jsonschema_rs.Validator:
    """By the newest draft that the schema is one of, where it does not name its own."""
    patterns = jsonschema_rs.FancyRegexOptions(backtrack_limit=MAX_BACKTRACKS)
    refused: list[ValueError] = []
    for make in (jsonschema_rs.validator_for, jsonschema_rs.Draft7Validator, jsonschema_rs.Draft4Validator):
        try:
            return make(schema, offline=True, validate_formats=True, pattern_options=patterns)
        except ValueError as error:  # those of jsonschema_rs are
            refused.append(error)
    reason = str(refused[0]).splitlines()[0]
    raise InvalidInput(f"this is no JSON schema: {_shortened(reason)}") from refused[0]


def _shortened(text: str) -> str:
    half = MAX_REASON_CHARS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}...{text[-half:]}"


def _copied(schema: object) -> Schema:
    if not isinstance(schema, Mapping):
        raise InvalidInput(f'{schema!r} is not a JSON schema: give a mapping, such as {{"type": "object"}}')
    try:
        copy: Schema = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the schema cannot be written as JSON: {error}") from error
    return copy


def _name_properties(schema: Schema, root: Schema) -> None:
    """Say by properties what is said of their names, which a grammar cannot hold."""
    names = _resolved(schema.get("propertyNames"), root)
    if names is None or {"properties", "patternProperties"} & schema.keys():
        return
    value = schema.get("additionalProperties", True)
    listed = names.get("enum", [names["const"]] if "const" in names else None)
    if isinstance(listed, list) and value is not False:
        schema["properties"] = {name: value for name in listed if isinstance(name, str)}
    elif isinstance(pattern := names.get("pattern"), str) and not {"minLength", "maxLength", "format"} & names.keys():
        schema["patternProperties"] = {pattern: value}
    else:
        return
    schema["additionalProperties"] = False
    del schema["propertyNames"]


def _resolved(schema: object, root: Schema) -> Schema | None:
    """The schema, or the one in `root` that it stands for; None where it is none."""
    for _ in range(MAX_CHECK_DEPTH):
        if not isinstance(schema, dict) or not isinstance(pointer := schema.get("$ref"), str):
            break
        schema = root if pointer == "#" else _at(pointer, root)
    return schema if isinstance(schema, dict) else None


def _at(pointer: str, root: Schema) -> object:
    found: object = root
    steps = pointer.removeprefix("#/").split("/") if pointer.startswith("#/") else [""]
    for step in steps:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def _drop_patterns(schema: Schema, is_taken: Callable[[str], bool]) -> set[str]:
    """Take out the patterns that are not taken; returns the keywords in which there were any."""
    dropped = set()
    if isinstance(pattern := schema.get("pattern"), str) and not is_taken(pattern):
        del schema["pattern"]
        dropped.add("pattern")
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, dict) and (left := [each for each in by_pattern if not is_taken(each)]):
        schema["patternProperties"] = {each: part for each, part in by_pattern.items() if each not in left}
        schema["additionalProperties"] = True  # their names cannot be told from others
        dropped.add("patternProperties")
    return dropped


@lru_cache(1024)
def _is_regular(pattern: str) -> bool:
    """Whether a grammar can hold a pattern: not one that looks around, or back."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(f"start: %json {schema}"))


@lru_cache(1024)
def _is_pattern(pattern: str) -> bool:
    try:
        jsonschema_rs.validator_for({"pattern": pattern})
    except ValueError:
        return False
    return True


def _close(schema: Schema) -> None:
    """Allow no further properties in objects that do not mention them.

    A schema that composes one object of several is left alone: what one part does not mention another may ask for.
    """
    parts = list(_parts(schema))
    if any(_is_composed(part) for part in parts):
        return
    for part in parts:
        if "properties" in part and not {"additionalProperties", "patternProperties"} & part.keys():
            part["additionalProperties"] = False


def _is_composed(schema: Schema) -> bool:
    if "allOf" in schema or ("properties" in schema and {"anyOf", "oneOf", "$ref", *_CONDITIONS} & schema.keys()):
        return True
    named = {name for name in _list(schema.get("required")) if isinstance(name, str)}
    return not named <= {*_mapping(schema.get("properties"))}


def _parts(schema: object) -> Iterator[Schema]:
    """The schema and every schema in it."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in _MAPS:
        for part in _mapping(schema.get(key)).values():
            yield from _parts(part)
    for key in _LISTS:
        for part in _list(schema.get(key)):
            yield from _parts(part)
    for key in _SINGLE:
        yield from _parts(schema.get(key))


class _Steps:
    """How often a check may look at the values on one way into an answer: an upper bound, found without an answer."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._found: dict[tuple[int, int], int] = {}

    def along(self, schema: object, depth: int) -> int:
        """Of a value that has others in it, so deep."""
        if depth > MAX_CHECK_DEPTH:
            return MAX_CHECK_STEPS + 1
        if not isinstance(schema, dict) or depth < 0:
            return 1
        key = id(schema), depth
        if key not in self._found:
            self._found[key] = MAX_CHECK_STEPS + 1  # where it refers to itself without going deeper
            count = 1 + sum(self.along(part, depth) for part in self._in_place(schema)) + _pattern_steps(schema)
            deeper = [self.along(part, depth - 1) for part in self._below(schema)]
            named = [self.along(part, depth - 1) for part in _mapping(schema.get("properties")).values()]
            listed = [self.along(part, depth - 1) for part in _list(schema.get("prefixItems"))]
            if any(key.startswith("unevaluated") for key in schema):
                count *= 2  # what the others looked at is found out anew
            count += sum(deeper) + max(named, default=0) + max(listed, default=0)  # a value has one name or place
            self._found[key] = min(count, MAX_CHECK_STEPS + 1)
        return self._found[key]

    def _in_place(self, schema: Schema) -> Iterator[object]:
        for key in ("anyOf", "oneOf", "allOf"):
            yield from _list(schema.get(key))
        yield from (schema[key] for key in (*_IN_PLACE, "unevaluatedItems", "unevaluatedProperties") if key in schema)
        yield from _mapping(schema.get("dependentSchemas")).values()
        for key in ("$ref", "$dynamicRef"):
            if isinstance(pointer := schema.get(key), str):
                # What is not found by its place is bound to be somewhere: it is taken for the largest there is.
                yield self._root if pointer == "#" else _at(pointer, self._root) or self._root

    def _below(self, schema: Schema) -> Iterator[object]:
        yield from (schema[key] for key in (*_OF_ITEMS, "propertyNames") if key in schema)
        yield from _mapping(schema.get("patternProperties")).values()


def _pattern_steps(schema: Schema) -> int:
    """Of the schema's own patterns at a text of one step: at worst, each backtrack reads the text in each state."""
    count = 0
    for pattern in (schema.get("pattern"), *_mapping(schema.get("patternProperties"))):
        if isinstance(pattern, str):
            repeats = [int(most or least) for least, most in _REPEATS.findall(pattern)]
            num_states = max(prod(max(each, 1) for each in repeats), len(pattern) // 2)
            count += (MAX_BACKTRACKS if _LOOKS_BACK.search(pattern) else 1) * (1 + (num_states // 32) ** 3)
    return count


def _depth_and_size(value: object) -> tuple[int, int]:
    """How deep it is, and how many steps one look at all of its values and names takes."""
    if isinstance(value, str):
        return 1, 1 + len(value) // CHARS_PER_STEP
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [_depth_and_size(each) for each in inner]
    names = sum(len(name) // CHARS_PER_STEP for name in value) if isinstance(value, dict) else 0
    return 1 + max((depth for depth, _ in found), default=0), 1 + names + sum(size for _, size in found)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
