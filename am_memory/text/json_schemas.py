"""Prepares JSON schemas for a grammar, and checks answers against the keywords that a grammar cannot express.

Knows no tokens and no engine. No reference is fetched from a network, and the time of a check is bounded.
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
from am_memory.formatting import shortened

Schema = dict[str, object]

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
"""JSON is written as `json.dumps` writes it: with free whitespace, a small model may never stop."""

MAX_CHECK_STEPS = 2_000_000
"""The most steps of one check; a step looks at one value. Nested alternatives would need far more."""
MAX_CHECK_DEPTH = 64
MAX_BACKTRACKS = 1_000
"""The most backtracks of one pattern on one text; a backtrack may take as long as a step of the check."""
CHARS_PER_STEP = 8
"""Characters of a text that are looked at in one step."""
MAX_REASON_CHARS = 300

_LOOKS_BACK = re.compile(r"\(\?(?!:)|\\[^dDsSwWbBnrtfv.^$*+?()\[\]{}|/-]|[+*?}]\+")
"""Matches patterns that may backtrack: lookaround, back-references and possessive repeats."""
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
"""Formats of the standard that no grammar can express; a format that is not in the standard is ignored."""


@dataclass(frozen=True)
class GrammarSchema:
    """A schema for a grammar of llguidance.

    Attributes:
        text: the schema as JSON.
        left_out: keywords of the original schema that the grammar cannot express.
    """

    text: str
    left_out: frozenset[str]


def for_grammar(schema: object) -> GrammarSchema:
    """Reduce a schema to the keywords that a grammar can express; objects get no properties that are not mentioned.

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
    """The keywords that llguidance leaves out of a grammar, by its warnings, without ignored formats."""
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
    """A value was not checked, as the check would take too long; the value may be right or wrong."""


class SchemaCheck:
    """Checks values against all keywords of a schema.

    A pattern that is no pattern of JSON Schema is ignored. `MAX_CHECK_STEPS` limits the steps of one check.

    Raises:
        InvalidInput: this is not a schema, or it refers to something outside of it.
    """

    def __init__(self, schema: object) -> None:
        self._schema = _copied(schema)
        for part in list(_parts(self._schema)):
            _drop_patterns(part, _is_pattern)
        self._validator = _validator(self._schema)

    def problem_with(self, value: object) -> str | None:
        """Describe what is wrong with a value; None if the value matches the schema.

        Raises:
            Unchecked: the check would take too long.
        """
        try:
            depth, size = _depth_and_size(value)
            num_steps = _Steps(self._schema).along(self._schema, depth) * size
        except RecursionError:
            num_steps = MAX_CHECK_STEPS + 1
        if num_steps > MAX_CHECK_STEPS:
            raise Unchecked(
                "it cannot be checked against its schema: the schema has too many nested alternatives, or patterns "
                "that are too large"
            )
        error = next(self._validator.iter_errors(value), None)
        if error is None:
            return None
        if isinstance(error.kind, (_Kind.BacktrackLimitExceeded, _Kind.RegexEngineFailure)):
            raise Unchecked("it cannot be checked against its schema: a pattern backtracks too often")
        place = "".join(f"[{step!r}]" for step in error.instance_path)
        return f"{place + ': ' if place else ''}{shortened(error.message, MAX_REASON_CHARS)}"


def _validator(schema: Schema) -> jsonschema_rs.Validator:
    """Make a validator for the draft that the schema names, else for the newest draft that accepts the schema."""
    patterns = jsonschema_rs.FancyRegexOptions(backtrack_limit=MAX_BACKTRACKS)
    refused: list[ValueError] = []
    for make in (jsonschema_rs.validator_for, jsonschema_rs.Draft7Validator, jsonschema_rs.Draft4Validator):
        try:
            return make(schema, offline=True, validate_formats=True, pattern_options=patterns)
        except ValueError as error:  # the base of the errors of jsonschema_rs
            refused.append(error)
    reason = str(refused[0]).splitlines()[0]
    raise InvalidInput(f"this is no JSON schema: {shortened(reason, MAX_REASON_CHARS)}") from refused[0]


def _copied(schema: object) -> Schema:
    if not isinstance(schema, Mapping):
        raise InvalidInput(f'{schema!r} is not a JSON schema: give a mapping, such as {{"type": "object"}}')
    try:
        copy: Schema = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"the schema cannot be written as JSON: {error}") from error
    return copy


def _name_properties(schema: Schema, root: Schema) -> None:
    """Express "propertyNames", which a grammar lacks, by "properties" or "patternProperties"."""
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
    """Follow references within `root`; None if the result is not a schema."""
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
    """Remove the patterns that `is_taken` refuses; return the keywords that had such patterns."""
    dropped = set()
    if isinstance(pattern := schema.get("pattern"), str) and not is_taken(pattern):
        del schema["pattern"]
        dropped.add("pattern")
    by_pattern = schema.get("patternProperties")
    if isinstance(by_pattern, dict) and (refused := {name for name in by_pattern if not is_taken(name)}):
        schema["patternProperties"] = {name: part for name, part in by_pattern.items() if name not in refused}
        schema["additionalProperties"] = True  # their names cannot be told from other names
        dropped.add("patternProperties")
    return dropped


@lru_cache(1024)
def _is_regular(pattern: str) -> bool:
    """Whether a grammar can express a pattern; it cannot if the pattern has lookaround or back-references."""
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
    """Forbid properties that are not mentioned, in objects that say nothing about them.

    A schema that composes an object from several parts is not changed: one part may require what another does not
    mention.
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
    """The schema and all schemas nested in it."""
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
    """An upper bound of how often a check looks at a value and the values in it, computed from the schema alone."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._found: dict[tuple[int, int], int] = {}

    def along(self, schema: object, depth: int) -> int:
        """The bound for a value with `depth` levels of values in it."""
        if depth > MAX_CHECK_DEPTH:
            return MAX_CHECK_STEPS + 1
        if not isinstance(schema, dict) or depth < 0:
            return 1
        key = id(schema), depth
        if key not in self._found:
            self._found[key] = MAX_CHECK_STEPS + 1  # for a schema that refers to itself at the same depth
            count = 1 + sum(self.along(part, depth) for part in self._in_place(schema)) + _pattern_steps(schema)
            deeper = [self.along(part, depth - 1) for part in self._below(schema)]
            named = [self.along(part, depth - 1) for part in _mapping(schema.get("properties")).values()]
            listed = [self.along(part, depth - 1) for part in _list(schema.get("prefixItems"))]
            if any(key.startswith("unevaluated") for key in schema):
                count *= 2  # the validator repeats the work of the other keywords
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
                # A reference that is not a path may point anywhere in the schema: take the largest part, the root.
                yield self._root if pointer == "#" else _at(pointer, self._root) or self._root

    def _below(self, schema: Schema) -> Iterator[object]:
        yield from (schema[key] for key in (*_OF_ITEMS, "propertyNames") if key in schema)
        yield from _mapping(schema.get("patternProperties")).values()


def _pattern_steps(schema: Schema) -> int:
    """An upper bound of the steps of a schema's patterns on a text of one step.

    In the worst case each backtrack reads the text in each state of the pattern.
    """
    count = 0
    for pattern in (schema.get("pattern"), *_mapping(schema.get("patternProperties"))):
        if isinstance(pattern, str):
            repeats = [int(most or least) for least, most in _REPEATS.findall(pattern)]
            num_states = max(prod(max(repeat, 1) for repeat in repeats), len(pattern) // 2)
            count += (MAX_BACKTRACKS if _LOOKS_BACK.search(pattern) else 1) * (1 + (num_states // 32) ** 3)
    return count


def _depth_and_size(value: object) -> tuple[int, int]:
    """The depth of a value, and the steps that are needed to look at all values and names in it once."""
    if isinstance(value, str):
        return 1, 1 + len(value) // CHARS_PER_STEP
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [_depth_and_size(item) for item in inner]
    names = sum(len(name) // CHARS_PER_STEP for name in value) if isinstance(value, dict) else 0
    return 1 + max((depth for depth, _ in found), default=0), 1 + names + sum(size for _, size in found)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
