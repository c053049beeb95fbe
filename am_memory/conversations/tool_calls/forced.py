"""Grammars for tool calls in the model's own format: calls that are forced, restricted or forbidden."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from am_memory.conversations.tool_calls.formats import ToolFormat
from am_memory.conversations.tool_calls.parsing import CALL_KEYS
from am_memory.conversations.tool_calls.prompt import tool_name
from am_memory.engines.base import Engine, Tool
from am_memory.errors import InvalidInput
from am_memory.text.constraints import Constraint, json_rule, json_schema, lark
from am_memory.text.json_schemas import GrammarSchema, for_grammar

BARE_OPENING = rf'/\{{\s*"({"|".join(CALL_KEYS)})"/'
"""The beginning of a call without markers, as a pattern of llguidance's grammars."""

ANY_OBJECT = {"type": "object", "additionalProperties": True}

JSON_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|, |: |.', re.DOTALL)

MAX_PARALLEL_CALLS = 16
"""The most calls in one answer. Without a limit a small model calls again and again."""


def tool_call_constraint(
    engine: Engine, tools: Sequence[Tool], format: ToolFormat, *, name: str | None = None, parallel: bool = False
) -> Constraint:
    """Force an answer that is a call of one of the tools, with arguments that follow its schema, and nothing else.

    If a marker of the format is one token of the vocabulary, the answer has that token. `Piece.text` leaves special
    tokens out, so give `parse` the text that `answer_text` makes of `Piece.token_ids`. An answer that was not cut off
    then parses into valid calls.

    Args:
        name: the tool to call; None: any tool.
        parallel: allow several calls.

    Raises:
        InvalidInput: there is no such tool, or its parameters cannot be enforced.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    chosen = [tool for tool in tools if name is None or tool_name(tool) == name]
    if not chosen:
        raise InvalidInput(f"no tool {name!r} to call among {[*map(tool_name, tools)]}: give one of them")
    calls = _Calls(engine, chosen, format, parallel=parallel)
    return calls.constraint([f"start: {calls.whole}"])


def calls_or_json_constraint(
    engine: Engine, tools: Sequence[Tool], format: ToolFormat, schema: object, *, parallel: bool = True
) -> Constraint:
    """Force an answer that is either calls, as in `tool_call_constraint`, or JSON that follows a schema.

    Raises:
        InvalidInput: the parameters or the schema cannot be enforced.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    calls, held = _Calls(engine, tools, format, parallel=parallel, is_beside_json=True), for_grammar(schema)
    return calls.constraint([f"start: {calls.whole} | json", f"json: {json_rule(held)}"], [held])


def calls_or_text_constraint(
    engine: Engine,
    tools: Sequence[Tool],
    format: ToolFormat,
    *,
    strict: Collection[str] = (),
    parallel: bool = True,
) -> Constraint:
    """Allow text, followed by calls of these tools if the model makes any.

    Text that begins like a call must be a call, in the model's reasoning too.

    Args:
        strict: names of the tools whose arguments must follow their schemas. Other arguments may be any object.
        parallel: allow several calls.

    Raises:
        InvalidInput: the parameters cannot be enforced.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    calls = _Calls(engine, [*map(partial(_as_free, strict=strict), tools)], format, parallel=parallel)
    head = format.begin + format.before_name
    if not format.is_bare:
        head = format.opening
    marker = _literal(engine, format, head)
    rules = [
        f"start: TEXT | lead {calls.without(head)}",
        # A marker that is a token ends the text. For any other marker, `lazy` ends the text where it first occurs.
        f"lead: TEXT {marker}" if marker.startswith("<[") else f"lead[lazy]: TEXT {marker}",
        f"TEXT: /.*/s{_no_calls(format)}",
    ]
    return calls.constraint(rules, has_text=True)


def _as_free(tool: Tool, *, strict: Collection[str]) -> Tool:
    """The tool. If it is not strict, any object is allowed for its arguments."""
    return tool if (name := tool_name(tool)) in strict else {"function": {"name": name, "parameters": ANY_OBJECT}}


class _Calls:
    """The grammar rules for calls of some tools.

    Attributes:
        whole: the calls with the text around them, for the right side of a rule.
    """

    def __init__(
        self,
        engine: Engine,
        tools: Sequence[Tool],
        format: ToolFormat,
        *,
        parallel: bool,
        is_beside_json: bool = False,
    ) -> None:
        self._engine, self._tools, self._format = engine, tools, format
        self._is_json = is_beside_json and format.is_bare
        begin, separator, end = (self._literal(text) for text in (format.begin, format.separator, format.end))
        more = f"({separator} call){{0,{MAX_PARALLEL_CALLS - 1}}}" if parallel else ""
        self._behind = f"{more} {end}"
        self.whole = f"{begin} call {self._behind}"
        self._schemas = [for_grammar(tool_parameters(tool)) for tool in tools]
        self._rules = [f"call: {self._each('call')}"]
        for number, schema in enumerate(self._schemas):
            before, after = self._before(number), self._literal(format.after_arguments)
            self._rules.append(f"call_{number}: {self._literal(before)} arguments_{number} {after}")
            self._rules.append(f"arguments_{number}: {json_rule(schema)}")

    def _literal(self, text: str) -> str:
        # A call that may still be other JSON is cut into the same tokens as JSON, so that the lexer can decide late.
        pieces = JSON_PARTS.findall(text) if self._is_json else [text]
        return " ".join(_literal(self._engine, self._format, piece) for piece in pieces)

    def _each(self, rule: str) -> str:
        return " | ".join(f"{rule}_{number}" for number in range(len(self._tools)))

    def _before(self, number: int) -> str:
        format = self._format
        return f"{format.before_name}{_name(self._tools[number], format)}{format.before_arguments}"

    def without(self, head: str) -> str:
        """`whole` without the text that it begins with."""
        after = self._literal(self._format.after_arguments)
        self._rules.append(f"first: {self._each('first')}")
        for number in range(len(self._tools)):
            rest = f"{self._format.begin}{self._before(number)}".removeprefix(head)
            self._rules.append(f"first_{number}: {self._literal(rest)} arguments_{number} {after}")
        return f"first {self._behind}"

    def constraint(
        self, rules: Sequence[str], schemas: Sequence[GrammarSchema] = (), *, has_text: bool = False
    ) -> Constraint:
        """The constraint of these rules, which begin with `start`, and the rules of the calls."""
        try:
            grammar = "\n".join([*rules, *self._rules])
            return lark(self._engine, grammar, [*self._schemas, *schemas], has_text=has_text)
        except InvalidInput as error:
            blamed = _blamed(self._engine, self._tools)
            if blamed is None:
                raise
            raise blamed from error


def no_call_constraint(engine: Engine, format: ToolFormat) -> Constraint:
    """Forbid calls: `parse` finds none in the answer, which has at least one character.

    Raises:
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    return lark(engine, f"start: TEXT\nTEXT: /.+/s{_no_calls(format)}")


def _no_calls(format: ToolFormat) -> str:
    """The part of a grammar's pattern that excludes calls."""
    openings = [*map(json.dumps, format.markers), *([BARE_OPENING] if format.is_bare else [])]
    return "".join(f" & ~(/.*/s {opening} /.*/s)" for opening in openings)


def _blamed(engine: Engine, tools: Sequence[Tool]) -> InvalidInput | None:
    """The error of the first tool whose parameters cannot be enforced, tried one by one; None if all can."""
    for tool in tools:
        try:
            json_schema(engine, tool_parameters(tool))
        except InvalidInput as error:
            return InvalidInput(f"the parameters of {tool_name(tool)} cannot be enforced: {error}")
    return None


def _name(tool: Tool, format: ToolFormat) -> str:
    name = tool_name(tool)
    if not format.is_name_quoted and not re.fullmatch(r"[^\s\[\]{}]+", name):
        raise InvalidInput(f"the tool name {name!r} runs into the text after it: use letters, digits, _ and -")
    return format.written_name(name)


def tool_parameters(tool: Tool) -> Mapping[str, object]:
    """The JSON schema of a tool's arguments, which are one object.

    Raises:
        InvalidInput: the schema is not that of an object.
    """
    function: Mapping[str, object] = tool["function"]  # type: ignore[assignment]  # as tool_name() found it
    schema = function.get("parameters") or {"properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InvalidInput(f"the parameters of {tool_name(tool)} are {schema!r}: give the JSON schema of an object")
    return {**schema, "type": "object"}


def _literal(engine: Engine, format: ToolFormat, text: str) -> str:
    """The text as a grammar rule. A marker that is one token stands as its token id."""
    pieces = re.split(f"({'|'.join(map(re.escape, format.markers))})", text) if format.markers else [text]
    return " ".join(
        _marker(engine, piece) if piece in format.markers else json.dumps(piece) for piece in pieces if piece
    )


def _marker(engine: Engine, marker: str) -> str:
    token_ids = engine.encode(marker)
    return f"<[{token_ids[0]}]>" if len(token_ids) == 1 else json.dumps(marker)
