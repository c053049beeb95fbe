"""Tool calls that a model has to make, may make in one form only, or may not make: grammars of its own format."""

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
"""How a call without markers begins, as a pattern of llguidance's grammars."""

ANY_OBJECT = {"type": "object", "additionalProperties": True}

JSON_PARTS = re.compile(r'"(?:\\.|[^"\\])*"|, |: |.', re.DOTALL)

MAX_PARALLEL_CALLS = 16
"""A small model that may always call once more never comes to an end."""


def tool_call_constraint(
    engine: Engine, tools: Sequence[Tool], format: ToolFormat, *, name: str | None = None, parallel: bool = False
) -> Constraint:
    """An answer that is one call of one of the tools, with arguments of its schema, and nothing else.

    Where a marker of the format is one token of the vocabulary, the answer has that token. A special one is missing
    from `Piece.text`: give `parse` the text that `answer_text` makes of `Piece.token_ids`, which is right for every
    vocabulary. An answer that was not cut off then parses into valid calls.

    Args:
        name: of the tool to call; None: any of them.
        parallel: one call or several.

    Raises:
        InvalidInput: no such tool, or parameters that cannot be enforced.
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
    """An answer that is either calls, as `tool_call_constraint` has them, or JSON of a schema.

    Raises:
        InvalidInput: parameters or a schema that cannot be enforced.
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
    """An answer that the model is free to give: text, and then calls if it likes, of these tools alone.

    What begins like a call is one, in its reasoning too.

    Args:
        strict: names of the tools whose arguments follow their schemas; those of others are any objects.
        parallel: one call or several.

    Raises:
        InvalidInput: parameters that cannot be enforced.
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    calls = _Calls(engine, [*map(partial(_as_free, strict=strict), tools)], format, parallel=parallel)
    head = format.begin + format.before_name
    if not format.is_bare:
        head = format.opening
    marker = _literal(engine, format, head)
    rules = [
        f"start: TEXT | lead {calls.without(head)}",
        # A marker that is a token ends the text by itself; any other is where the text is first seen to hold it.
        f"lead: TEXT {marker}" if marker.startswith("<[") else f"lead[lazy]: TEXT {marker}",
        f"TEXT: /.*/s{_no_calls(format)}",
    ]
    return calls.constraint(rules, has_text=True)


def _as_free(tool: Tool, *, strict: Collection[str]) -> Tool:
    """The tool, with any object for arguments where it is not strict."""
    return tool if (name := tool_name(tool)) in strict else {"function": {"name": name, "parameters": ANY_OBJECT}}


class _Calls:
    """The rules of a grammar for calls of some tools.

    Attributes:
        whole: all of them, with what stands around, for the right side of a rule.
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
        self._schemas = [for_grammar(parameters(tool)) for tool in tools]
        self._rules = [f"call: {self._each('call')}"]
        for number, schema in enumerate(self._schemas):
            before, after = self._before(number), self._literal(format.after_arguments)
            self._rules.append(f"call_{number}: {self._literal(before)} arguments_{number} {after}")
            self._rules.append(f"arguments_{number}: {json_rule(schema)}")

    def _literal(self, text: str) -> str:
        # Where a call may be other JSON for a while, it consists of the same parts, between which a lexer can part.
        pieces = JSON_PARTS.findall(text) if self._is_json else [text]
        return " ".join(_literal(self._engine, self._format, piece) for piece in pieces)

    def _each(self, rule: str) -> str:
        return " | ".join(f"{rule}_{number}" for number in range(len(self._tools)))

    def _before(self, number: int) -> str:
        format = self._format
        return f"{format.before_name}{_name(self._tools[number], format)}{format.before_arguments}"

    def without(self, head: str) -> str:
        """`whole` but for what it begins with."""
        after = self._literal(self._format.after_arguments)
        self._rules.append(f"first: {self._each('first')}")
        for number in range(len(self._tools)):
            rest = f"{self._format.begin}{self._before(number)}".removeprefix(head)
            self._rules.append(f"first_{number}: {self._literal(rest)} arguments_{number} {after}")
        return f"first {self._behind}"

    def constraint(
        self, rules: Sequence[str], schemas: Sequence[GrammarSchema] = (), *, has_text: bool = False
    ) -> Constraint:
        """That of these rules, the first of which is `start`, and of the calls."""
        try:
            grammar = "\n".join([*rules, *self._rules])
            return lark(self._engine, grammar, [*self._schemas, *schemas], has_text=has_text)
        except InvalidInput as error:
            blamed = _blamed(self._engine, self._tools)
            if blamed is None:
                raise
            raise blamed from error


def no_call_constraint(engine: Engine, format: ToolFormat) -> Constraint:
    """An answer of at least one character in which `parse` finds no call.

    Raises:
        UnsupportedOperation: the engine's tokenizer cannot be constrained.
    """
    return lark(engine, f"start: TEXT\nTEXT: /.+/s{_no_calls(format)}")


def _no_calls(format: ToolFormat) -> str:
    """What is added to a pattern of a grammar, so that it holds no call."""
    openings = [*map(json.dumps, format.markers), *([BARE_OPENING] if format.is_bare else [])]
    return "".join(f" & ~(/.*/s {each} /.*/s)" for each in openings)


def _blamed(engine: Engine, tools: Sequence[Tool]) -> InvalidInput | None:
    """The error of the first tool whose parameters alone are refused."""
    for tool in tools:
        try:
            json_schema(engine, parameters(tool))
        except InvalidInput as error:
            return InvalidInput(f"the parameters of {tool_name(tool)} cannot be enforced: {error}")
    return None


def _name(tool: Tool, format: ToolFormat) -> str:
    name = tool_name(tool)
    if not format.is_name_quoted and not re.fullmatch(r"[^\s\[\]{}]+", name):
        raise InvalidInput(f"the tool name {name!r} cannot be told from what follows it: use letters, digits, _ and -")
    return format.written_name(name)


def parameters(tool: Tool) -> Mapping[str, object]:
    """The schema of a tool's arguments, which are always one object.

    Raises:
        InvalidInput: it is that of something else.
    """
    function: Mapping[str, object] = tool["function"]  # type: ignore[assignment]  # as tool_name() found it
    schema = function.get("parameters") or {"properties": {}}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise InvalidInput(f"the parameters of {tool_name(tool)} are {schema!r}: give the JSON schema of an object")
    return {**schema, "type": "object"}


def _literal(engine: Engine, format: ToolFormat, text: str) -> str:
    """The text in a rule of a grammar, with markers by their token ids where they have one."""
    pieces = re.split(f"({'|'.join(map(re.escape, format.markers))})", text) if format.markers else [text]
    return " ".join(
        _marker(engine, piece) if piece in format.markers else json.dumps(piece) for piece in pieces if piece
    )


def _marker(engine: Engine, marker: str) -> str:
    token_ids = engine.encode(marker)
    return f"<[{token_ids[0]}]>" if len(token_ids) == 1 else json.dumps(marker)
